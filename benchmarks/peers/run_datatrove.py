"""datatrove: JsonlReader into DocumentTokenizer without its shuffle, LocalPipelineExecutor, with a task and a worker for each core.

Its tasks are whole files, so it gets the text in parts.
"""

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from task import Task


def main() -> None:
    task = Task.read()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(task.parts)),
            DocumentTokenizer(
                output_folder=str(task.out / "tokens"),
                tokenizer_name_or_path=str(task.tokenizer),
                eos_token=task.eos_token,
                shuffle_documents=False,
            ),
        ],
        tasks=task.cores,
        workers=task.cores,
        logging_dir=str(task.out / "logs"),
    ).run()


if __name__ == "__main__":
    main()
