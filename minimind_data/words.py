"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: `1 shard`, `2,000 shards`; an English noun with a regular plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
