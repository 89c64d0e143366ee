"""docs/options.zh.md has every option of every command, as the program has them today."""

from tests.helpers.options_page import CHINESE, HEAD, MARKED, PAGE, commands, page


def test_the_page_is_that_of_todays_options():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.helpers.options_page"


def test_no_option_is_missing_and_no_line_is_of_an_option_that_is_gone():
    sections = {
        section.partition("\n")[0]: section for section in PAGE.read_text(encoding="utf-8").split("\n## ")
    }
    shared = next(text for title, text in sections.items() if "`sft` 和 `dpo` 共有" in title)
    known = set()
    for (program, name), options in commands().items():
        own = sections.get(f"`{program} {name}`", "")
        text = own + shared if name in {"pretrain", "sft", "dpo"} else own
        for flag, names in options.items():
            assert all(f"`{one}`" in text for one in names) or f"`{flag}`" in text, (name, flag)
            known |= {flag, name + flag}
    assert set(CHINESE) <= known
    assert known >= MARKED


def test_about_a_dozen_are_marked():
    assert 12 <= len(MARKED) <= 18
    assert PAGE.read_text(encoding="utf-8").removeprefix(HEAD).count("★") >= len(MARKED)
