"""The command line every task shares: Hydra underneath, one sentence when something is wrong.

A task's ``__main__`` calls :func:`main` with the function that runs it. Heavy libraries are imported by that function,
after the configuration has been composed, so that ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import InputError, nearest_name, unknown_name
from kernels.threads import spin_briefly
from tasks.common.files import explain_os_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIGURATION = "pkg://conf"
# Groups whose choice may also be a name outside conf/: a class of the user's own, or any timm model.
OPEN_GROUPS = ("attention", "backbone", "decoder")
# The kernels' settings as environment variables, with what the user has put there.
KERNEL_VARIABLES = {
    "backend": ("FOVEA_KERNELS", os.environ.get("FOVEA_KERNELS")),
    "autotune": ("FOVEA_AUTOTUNE", os.environ.get("FOVEA_AUTOTUNE")),
}
# Sections that take any key: handed on as they stand to a class that checks them.
OPEN_SECTIONS = ("attention.", "trainer.", "backbone.params.", "hydra.")


@dataclass(frozen=True)
class Task:
    """What the command line needs to know of a task.

    Attributes:
        name: ``python -m tasks.<name>`` and ``conf/<name>.yaml``.
        run: called with the composed configuration and the output folder; may return metrics for a sweep's table.
        groups: configuration groups to list in ``--help``.
        examples: command lines to show, without ``python -m tasks.<name>``.
        adjust: may add overrides that follow from the others, such as the demo when no data are named.
        help_files: files of conf/ whose options ``--help`` shows too.
        choices: the names of a group that are for this task, where not all are.
    """

    name: str
    run: Callable[[DictConfig, Path], dict[str, Any] | None]
    groups: Sequence[str]
    examples: Sequence[tuple[str, str]]
    adjust: Callable[[list[str]], list[str]] = lambda overrides: overrides
    help_files: Sequence[str] = field(default_factory=tuple)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def choices_of(self, group: str) -> Sequence[str]:
        """Names of a group that this task can use."""
        return self.choices.get(group) or choices_of(group)


def data_as_path(overrides: Sequence[str], names: Sequence[str]) -> list[str]:
    """``data=DIR`` as ``data.path=DIR``, for a folder or file that is none of the group's ``names``.

    >>> data_as_path(["data=./scans", "data=demo", "seed=2"], ["demo"])
    ['data.path=./scans', 'data=demo', 'seed=2']
    """

    def is_path(value: str) -> bool:
        return value not in names and ("/" in value or Path(value.strip("'\"")).exists())

    return [
        f"data.path={value}" if key == "data" and is_path(value) else override
        for override in overrides
        for key, _, value in [override.partition("=")]
    ]


def main(task: Task, arguments: Sequence[str] | None = None) -> int:
    """Run a task from the command line; the return value is the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    spin_briefly()
    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(BrokenPipeError):  # the reader may stop early: --help | head
            print(help_text(task), flush=True)
        return 0
    try:
        return _compose_and_run(task, _prepare_arguments(task, arguments))
    except InputError as error:
        return _say(str(error))
    except KeyboardInterrupt:
        _say("stopped; what is finished is kept, and the same command goes on from there.")
        return 130


def _compose_and_run(task: Task, arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    outcomes: list[tuple[list[str], Path, dict[str, Any] | None]] = []
    failures: list[str] = []
    there = _folders_there(task, arguments)

    def job(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        out = Path(settings.runtime.output_dir)
        overrides = list(settings.overrides.task)
        _start_logging()
        try:
            _choose_kernels(cfg)
            outcomes.append((overrides, out, task.run(cfg, out)))
        except Exception as error:
            sentence = input_error_in(error)
            if sentence is None:
                raise
            if "basic" not in settings.launcher._target_.lower():
                raise InputError(sentence) from error  # in a process of its own on a cluster, whose log shows it
            # One failed job of a sweep must not take the others with it, so nothing is raised before all have run.
            failures.append(f"{' '.join(overrides)}: {sentence}" if settings.mode == RunMode.MULTIRUN else sentence)
        finally:
            _remove_if_empty(out, there)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed by Hydra
    previous = sys.argv
    sys.argv = [f"tasks.{task.name}", *arguments]
    try:
        with explain_os_errors("the output folder"):
            hydra.main(version_base="1.3", config_path=CONFIGURATION, config_name=task.name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, task, arguments)) from error
    finally:
        sys.argv = previous
    if len(outcomes) + len(failures) > 1:
        from tasks.common.sweep import write_comparison

        write_comparison(outcomes)
        for sweep in {out.parent for _, out, _ in outcomes}:
            if [path.name for path in sweep.glob("*")] == ["multirun.yaml"]:  # its jobs went on in an earlier sweep
                (sweep / "multirun.yaml").unlink()
                _remove_if_empty(sweep, there)
    for failure in failures:
        _say(failure)
    return 2 if failures else 0


def _choose_kernels(cfg: DictConfig) -> None:
    """Hand ``kernels.*`` on through the environment, which worker processes inherit and which needs no import yet."""
    chosen = cfg.get("kernels") or {}
    if (backend := str(chosen.get("backend", "auto"))) not in choices_of("kernels"):
        raise unknown_name("kernels.backend", backend, choices_of("kernels"))
    for name, value in (("backend", backend), ("autotune", chosen.get("autotune", False))):
        variable, unset = KERNEL_VARIABLES[name]
        if value not in ("auto", False):
            os.environ[variable] = str(int(value)) if isinstance(value, bool) else value
        elif unset is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = unset
    if "kernels.backend" in sys.modules:  # an earlier job of a sweep has read the environment
        import kernels

        kernels.configure(os.environ.get("FOVEA_KERNELS", "auto"), os.environ.get("FOVEA_AUTOTUNE", "0") == "1")


def _folders_there(task: Task, arguments: Sequence[str]) -> set[Path]:
    """The output folder and those above it that the user has made already, and the working folder."""
    given = [value.strip("'\"") for key, _, value in (text.partition("=") for text in arguments) if key == "out"]
    out = Path(given[-1] if given else f"outputs/{task.name}").absolute()
    return {path for path in (out, *out.parents, Path.cwd(), *Path.cwd().parents) if path.exists()}


def _remove_if_empty(folder: Path, there: Collection[Path]) -> None:
    """Hydra makes the output folder before anything is known; one that nothing was written to goes again."""
    for path in (folder.absolute(), *folder.absolute().parents[:2]):
        if path in there:
            return
        try:
            path.rmdir()
        except OSError:
            return


def input_error_in(error: BaseException) -> str | None:
    """The sentence for the user when ``error`` is or carries an InputError, else None.

    Data-loader workers send an exception as text with its trace; the sentence is the last line.
    """
    if not isinstance(error, InputError):
        return None
    text = str(error)
    if "Original Traceback" in text:
        last = text.strip().splitlines()[-1]
        return last.partition("InputError: ")[2] or last
    return text


def _prepare_arguments(task: Task, arguments: list[str]) -> list[str]:
    """Flags and overrides as Hydra will take them: a saved run found, open names registered, unknown keys refused."""
    flags, overrides = _split(arguments)
    saved = _saved_run(flags)
    if saved is None:
        overrides = task.adjust(overrides)
    for override in overrides:
        _check_override(override, task)
        if override.startswith("out="):
            _check_folder(Path(override.removeprefix("out=").strip("'\"")))
    if saved is None:
        _check_types(overrides, task)
    return [*flags, *overrides]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides."""
    takes_value = {
        "--config-path",
        "-cp",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
        "--cfg",
        "-c",
        "--package",
        "-p",
    }
    flags: list[str] = []
    overrides: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting or argument.startswith("-"):
            waiting = not waiting and argument in takes_value
            flags.append(argument)
        else:
            overrides.append(argument)
    return flags, overrides


def _saved_run(flags: list[str]) -> Path | None:
    """The run folder named by ``--config-path``, whose flags are completed in place; None when there is none."""
    for position, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name not in ("--config-path", "-cp"):
            continue
        folder = Path(value or (flags[position + 1] if position + 1 < len(flags) else ""))
        if not (folder / "config.yaml").is_file():
            raise InputError(f"--config-path {folder} holds no config.yaml; give the folder of an earlier run.")
        flags[position : position + (1 if value else 2)] = ["--config-path", str(folder.resolve())]
        if not any(f.startswith(("--config-name", "-cn")) for f in flags):
            flags += ["--config-name", "config"]
        return folder
    return None


def _check_folder(folder: Path) -> None:
    """Refuse an output folder that is, or lies in, a file."""
    existing = next(
        path for path in (folder, *folder.parents) if path.exists() or path == path.parent or path == Path()
    )
    if existing.exists() and not existing.is_dir():
        raise InputError(f"out={folder}: {existing} is a file; choose a folder.")


def _check_override(override: str, task: Task) -> None:
    match = re.match(r"(?P<sign>\+{0,2}|~)(?P<key>[\w./@:-]+)=(?P<value>.*)$", override, re.DOTALL)
    if match is None:
        if override.startswith("~"):
            return
        raise InputError(f"'{override}' is not an option; options are written key=value (see --help).")
    key, value, sign = match["key"], match["value"], match["sign"]
    group = key.split("@")[0]
    if group in OPEN_GROUPS and value not in ("", "null"):
        for choice in value.split(","):
            _register_open_choice(group, choice.strip().strip("'\""))
        if group == "attention" and not sign:
            raise InputError(f"attention is in no default; add it with a plus sign: +attention={value}")
        return
    if group in task.choices and (strange := [v for v in value.split(",") if v not in task.choices[group]]):
        raise unknown_name(group, strange[0], task.choices[group])
    added = sign.startswith("+") and group not in choices_of(None) and "." in key
    if sign == "+" and "." not in key and group not in choices_of(None):
        raise _unknown_key(key, task)
    if added and not key.startswith(OPEN_SECTIONS) and key not in known_keys(task):
        raise _unknown_key(key, task)


def _check_types(overrides: list[str], task: Task) -> None:
    """Refuse words where the default is a number, and anything but true or false where it is a truth value."""
    values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o and not o.startswith("~"))
    groups = [f"{k}={v.split(',')[0]}" for k, v in values.items() if k in choices_of(None) and k not in OPEN_GROUPS]
    try:
        defaults = _flat_defaults(task, groups)
    except Exception:  # a wrong group choice is explained when the whole is composed
        return
    for key, text in values.items():
        default = defaults.get(key)
        if text[:1] in "[{$'\"" or "(" in text or text == "null":
            continue
        for value in text.split(","):
            if isinstance(default, bool):
                if value.lower() not in ("true", "false"):
                    raise InputError(f"option '{key}' is true or false, not '{value}'.")
            elif isinstance(default, int | float):
                try:
                    number = float(value)
                except ValueError:
                    raise InputError(f"option '{key}' takes a number, not '{value}'.") from None
                if isinstance(default, int) and not number.is_integer():
                    raise InputError(f"option '{key}' takes a whole number, not '{value}'.")


def _register_open_choice(group: str, choice: str) -> None:
    """Make ``group=choice`` composable when the choice is a dotted path or, for backbones, any name timm knows."""
    files = choices_of(group)
    if choice in files or choice.startswith(("glob(", "choice(", "range(")):
        return
    if group in ("attention", "decoder"):
        if ":" not in choice:
            listing = "A class of your own is named by its path, package.module:Class."
            raise unknown_name(group, choice, files, listing)
    elif ":" not in choice:
        import backbones

        if choice not in (known := [*files, *backbones.available()]):
            raise unknown_name(
                "backbone", choice, known, 'All: python -c "import backbones; print(backbones.available())"'
            )
    from hydra.core.config_store import ConfigStore

    node: dict[str, Any] = {"name": choice}
    if group == "backbone":
        node |= {"pretrained": False, "checkpoint": None, "params": {}}
    folder, _, name = f"{group}/{choice}".rpartition("/")
    ConfigStore.instance().store(group=folder, name=name, node=node)


def choices_of(group: str | None) -> list[str]:
    """Names of the YAML files of a group, or the names of the groups themselves for None."""
    root = resources.files("conf")
    folder = root if group is None else root / group
    if not folder.is_dir():
        return []
    if group is None:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("_"))
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def known_keys(task: Task) -> list[str]:
    """Every key of the task's configuration, dotted, whichever data set is chosen."""
    keys = set(_flat_defaults(task, ()))
    for choice in task.choices_of("data") if "data" in task.groups else ():
        keys |= set(_flat_defaults(task, (f"data={choice}",)))
    return sorted(keys)


def _flat_defaults(task: Task, overrides: Iterable[str]) -> dict[str, Any]:
    """Dotted keys and default values of the composed configuration; sections hold their own dictionaries."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_module(config_module="conf", version_base="1.3"):
        cfg = compose(task.name, overrides=list(overrides))
    GlobalHydra.instance().clear()

    def walk(node: Any, prefix: str) -> Iterable[tuple[str, Any]]:
        for name, value in node.items():
            yield f"{prefix}{name}", value
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return dict(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def _unknown_key(key: str, task: Task) -> InputError:
    known = known_keys(task)
    if key in known:
        return InputError(
            f"option '{key}' does not go with the data set chosen; see python -m tasks.{task.name} --help"
        )
    near = nearest_name(key, known) or next((k for k in known if k.split(".")[-1] == key.split(".")[-1]), None)
    if near is None:
        near = nearest_name(key.split(".")[-1], {k.split(".")[-1]: 0 for k in known})
        near = next((k for k in known if k.split(".")[-1] == near), None)
    hint = f" Did you mean '{near}'?" if near else ""
    return InputError(f"option '{key}' is not known.{hint} All options: python -m tasks.{task.name} --help")


def _explain(error: Exception, task: Task, arguments: list[str]) -> str:
    """One sentence for what Hydra or OmegaConf found wrong."""
    text = str(error)
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        if missing[1].startswith("hydra/"):
            return f"{missing[1]} '{missing[2]}' is not installed; for SLURM: pip install 'fovea-toolkit[slurm]'"
        return str(unknown_name(missing[1], missing[2], choices_of(missing[1])))
    if unknown := re.search(r"Could not override '([^']+)'", text):
        key = unknown[1]
        if key in choices_of(None):
            return f"{key} is in no default; add it with a plus sign: +{key}=NAME"
        if key.startswith(OPEN_SECTIONS):
            return f"option '{key}' has no default here; add it with a plus sign: +{key}=VALUE"
        return str(_unknown_key(key, task))
    if key := re.search(r"full_key: (\S+)", text):
        return f"option '{key[1]}': {text.splitlines()[0]}"
    return f"the options cannot be read: {text.splitlines()[0]}"


def help_text(task: Task) -> str:
    """What ``--help`` prints: purpose, examples, groups, options with their comments."""
    root = resources.files("conf")
    about = task_summary(task.name)
    lines = [about, "", f"usage: python -m tasks.{task.name} [key=value ...] [+attention=NAME] [-m]", "", "Examples"]
    lines += [f"  python -m tasks.{task.name} {command}\n      {purpose}" for command, purpose in task.examples]
    lines += ["", "Groups (group=name)"]
    for group in task.groups:
        sign = "+" if group == "attention" else ""
        own = "; or your own package.module:Class"
        more = {"attention": own, "decoder": own, "backbone": "; any timm name; package.module:Class"}
        lines.append(f"  {sign}{group}: {', '.join(task.choices_of(group))}{more.get(group, '')}")
    lines += ["", "Options (key=value), with their defaults"]
    for name in ("common.yaml", f"{task.name}.yaml", *task.help_files):
        section, options = name.rpartition("/")[0], _option_lines((root / name).read_text())
        lines += [f"  {section}:", *(f"  {line}" for line in options)] if section else options
    lines += [
        "",
        "Values separated by commas run one after the other with -m; +trainer.OPTION=... is handed to Lightning.",
        f"python -m tasks.{task.name} --config-path RUN repeats the run in folder RUN.",
    ]
    return "\n".join(lines)


def _option_lines(text: str) -> list[str]:
    """A YAML file without its package line, defaults list and Hydra section."""
    kept, inside = [], False
    for line in text.splitlines():
        if re.match(r"(defaults|hydra):", line):
            inside = True
        elif inside and line and not line.startswith((" ", "#")):
            inside = False
        if not inside and line.strip() and not line.startswith("# @package"):
            kept.append(f"  {line}")
    return kept


def task_summary(name: str) -> str:
    """First line of a task package's docstring, read without importing it."""
    import ast

    source = (resources.files("tasks") / name / "__init__.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _start_logging() -> None:
    """Our log lines on standard error, through rich; other libraries only from warnings up."""
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    root = logging.getLogger()
    if not any(isinstance(handler, RichHandler) for handler in root.handlers):
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%X]")
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in ("tasks", "backbones", "attention", "kernels"):
        logging.getLogger(package).setLevel(logging.INFO)


def _say(sentence: str) -> int:
    print(f"error: {sentence}" if not sentence.startswith("stopped") else sentence, file=sys.stderr)
    return 2
