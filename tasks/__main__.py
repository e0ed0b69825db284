"""``python -m tasks`` lists the tasks with one line each."""

from importlib import resources

from tasks.common.cli import task_summary


def main() -> None:
    """Print every package here that can be run."""
    names = sorted(e.name for e in resources.files("tasks").iterdir() if e.is_dir() and (e / "__main__.py").is_file())
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {task_summary(name)}")
    print("\nRun one with: python -m tasks.NAME   (options: python -m tasks.NAME --help)")


if __name__ == "__main__":
    main()
