"""The model card of a run: what the model is, how it did, and everything needed to make it again.

A card is published, so it holds no secret and no path of the machine it was written on.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from prefopt.reference.rule import in_words, sync_rule
from prefopt.report.plots import FOLDER, OVERVIEW
from prefopt.report.results import RESULTS_FILE, plain, without_secrets, write_whole

CARD_FILE = "README.md"
PLUGINS = "plugins"  # of a run folder: the files of losses from outside the package

# In this order at the head of the results table; any other metric follows by name.
FIRST_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "entropy")
_SHOWN = 16  # digits of a fingerprint in the card
_BOOKKEEPING = re.compile(r"^(train_)?(epoch|step|total_flos|runtime|.*_per_second|learning_rate|grad_norm)$")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_ARXIV = re.compile(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})", re.IGNORECASE)


def write_card(
    folder: str | Path,
    recipe: Mapping[str, Any],
    *,
    base_model: str | None = None,
    loss_docs: Mapping[str, str] | None = None,
    license: str | None = None,
    note: str = "",
) -> Path:
    """Write `README.md` into a finished run's folder, from its `results.json` and its plots.

    `loss_docs` maps the name of each loss to its docstring, whose title and arXiv numbers are quoted.
    """
    folder = Path(folder)
    results = folder / RESULTS_FILE
    text = model_card(
        recipe,
        json.loads(results.read_text(encoding="utf-8")) if results.exists() else {},
        sorted((folder / FOLDER).glob("*.png")),
        base_model,
        title=str(recipe.get("hub_model_id") or folder.resolve().name),
        loss_docs=loss_docs,
        license=license,
        adapter=(folder / "adapter_config.json").exists(),
        chat=(folder / "chat_template.jinja").exists(),
        recipe_file=(folder / "recipe.yaml").exists(),
        plugins=sorted(path.name for path in (folder / PLUGINS).glob("*.py")),
        note=note,
    )
    write_whole(folder / CARD_FILE, text)
    return folder / CARD_FILE


def model_card(
    recipe: Mapping[str, Any],
    results: Mapping[str, Any],
    plots: Sequence[Path] = (),
    base_model: str | None = None,
    *,
    title: str = "model",
    loss_docs: Mapping[str, str] | None = None,
    license: str | None = None,
    adapter: bool = False,
    chat: bool = False,
    recipe_file: bool = False,
    plugins: Sequence[str] = (),
    note: str = "",
) -> str:
    """The text of a card: a YAML header the Hub reads, then Markdown.

    `results` may hold `train` and `eval` (final figures by metric), `data` (a token report as a dict for each split,
    or just `{"kept": n, "dropped": {reason: n}}`), `fingerprint` (a hash for each split), `versions` and `devices`;
    whatever is absent is left out. `plots` are linked as `plots/NAME`. `base_model` is the recipe's model where not
    given. `recipe_file`: the recipe lies beside the card, and `plugins`, the files of losses from outside the
    package, in `plugins/`. `note` is put under the title.
    """
    base = base_model or recipe.get("model_name_or_path")
    recipe, results = publishable(recipe), publishable(results)
    own_base = str(publishable(base or "base")) if adapter and not on_hub(base) else ""
    docs = {name: (loss_docs or {}).get(name, "") for name in loss_names(recipe)}
    sections = [
        f"# {publishable(title)}",
        note,
        _introduction(_start(base, adapter), _datasets(recipe), docs, adapter),
        in_words(sync_rule(recipe.get("reference"))),
        _results_section(results),
        _curves_section(plots),
        _data_section(results.get("data", {}), results.get("fingerprint", {})),
        _usage_section(publishable(title), chat, own_base),
        _recipe_section(reproducible(recipe), _again(recipe, plugins) if recipe_file else ""),
        _versions_section(results),
        _papers_section(docs),
    ]
    header = _header(base, recipe, list(docs), license, adapter)
    return f"---\n{header}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def addressed(text: str, repo: str) -> str:
    """A card under the name it has on the Hub, which need not be known when it is written."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if title is None or title[1] == repo:
        return text
    text = text.replace(f"\n# {title[1]}\n", f"\n# {repo}\n", 1)
    return re.sub(rf'((model=|\(base, )"){re.escape(title[1])}"', rf'\g<1>{repo}"', text)


def publishable(value: Any) -> Any:
    """A copy that may leave the machine: without secrets, and with the last part alone of each absolute path."""
    return _without_paths(plain(without_secrets(value)))


def reproducible(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as others get it: it makes the model again, and does not push it to where this one was pushed."""
    return {name: value for name, value in recipe.items() if name != "push_to_hub" and not name.startswith("hub_")}


def loss_names(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the recipe's loss, or of the losses in its mixture."""
    losses = recipe.get("loss", [])
    losses = losses if isinstance(losses, list | tuple) else [losses]
    return [str(loss["name"]) if isinstance(loss, Mapping) else str(loss) for loss in losses]


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if PurePosixPath(value).is_absolute() or value.startswith("~"):
        return PurePosixPath(value).name
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return value.replace(str(Path.home()), "~")


def _header(base: str | None, recipe: Mapping[str, Any], losses: list[str], license: str | None, adapter: bool) -> str:
    data = ModelCardData(
        base_model=base if on_hub(base) else None,
        datasets=[name for name in _datasets(recipe) if on_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["prefopt", *losses],
    )
    return str(data.to_yaml())


def on_hub(name: str | None) -> bool:
    """Whether this reads as a name on the Hub, and is no folder here: a card's header may hold nothing else."""
    return bool(name) and _HUB_NAME.match(str(name)) is not None and not Path(str(name)).exists()


def _start(base: str | None, adapter: bool) -> str:
    if not base:
        return "on a model that has no name" if adapter else "from scratch"
    return "from " + (f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{publishable(base)}`")


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """Data sets and files that a recipe trains on."""
    parts = [recipe.get("dataset_name"), recipe.get("data_files")]
    entries = [*(recipe.get("datasets") or []), *(recipe.get("targets") or [])]
    parts += [entry.get("path") or entry.get("data_files") for entry in entries]
    return [name for part in parts for name in _names(part)]


def _names(part: Any) -> list[str]:
    """What a setting names to train on: one file or data set, a list of files, or the `train` of a block of files."""
    named = part.get("train") if isinstance(part, Mapping) else part
    return [named] if isinstance(named, str) else [str(name) for name in named or []]


def _introduction(start: str, datasets: list[str], docs: Mapping[str, str], adapter: bool) -> str:
    kind = "adapter" if adapter else "model"
    data = f" on the preferences in {', '.join(f'`{name}`' for name in datasets)}" if datasets else ""
    losses = " and ".join(f"`{name}`" for name in docs) or "a preference loss"
    lines = [f"This {kind} was trained {start}{data}, with the loss {losses}, by `prefopt`."]
    lines += [f"- `{name}`: {_title(doc)}" for name, doc in docs.items() if doc.strip()]
    return "\n\n".join([lines[0], "\n".join(lines[1:])]).strip()


def _title(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())


def _results_section(results: Mapping[str, Any]) -> str:
    train = _figures(results.get("train", {}))
    evaluation = _figures({name.removeprefix("eval_"): value for name, value in results.get("eval", {}).items()})
    names = [name for name in FIRST_METRICS if name in train or name in evaluation]
    names += sorted((train.keys() | evaluation.keys()) - set(names))
    if not names:
        return ""
    rows = [f"| `{name}` | {train.get(name, '')} | {evaluation.get(name, '')} |" for name in names]
    head = ["| metric | training, last logged | evaluation |", "| --- | ---: | ---: |"]
    return "\n".join(["## Results", "", *head, *rows])


def _figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    kept = {name: value for name, value in metrics.items() if not _BOOKKEEPING.match(name)}
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in kept.items()}


def _curves_section(plots: Sequence[Path]) -> str:
    if not (names := [path.name for path in plots]):
        return ""
    shown = [OVERVIEW] if OVERVIEW in names else names
    images = [f"![{Path(name).stem}]({FOLDER}/{name})" for name in shown]
    links = [f"[{Path(name).stem}]({FOLDER}/{name})" for name in names if name not in shown]
    return "\n\n".join(["## Curves", *images, *([f"One by one: {', '.join(links)}."] if links else [])])


def _data_section(data: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    if not data:
        return ""
    rows = [["split", "rows used", "left out"], ["---", "---:", "---"]]
    data = dict(sorted(data.items(), key=lambda split: split[0] != "train"))
    for split, counts in data.items():
        dropped = {reason: _count(tally) for reason, tally in counts.get("dropped", {}).items()}
        left_out = [f"{count} ({reason.replace('_', ' ')})" for reason, count in dropped.items() if count]
        rows.append([split, str(counts.get("kept", "")), ", ".join(left_out) or "none"])
    if fingerprints:
        marks = [f"`{fingerprints[split][:_SHOWN]}`" if split in fingerprints else "" for split in data]
        rows = [[*row, mark] for row, mark in zip(rows, ["fingerprint", "---", *marks], strict=True)]
    lines = ["## Data", "", *(f"| {' | '.join(row)} |" for row in rows)]
    if fingerprints:
        whole = "all of them are in `results.json`"
        lines += ["", f"A fingerprint is the SHA-256 of a split's token rows: its first {_SHOWN} digits here, {whole}."]
    return "\n".join(lines)


def _count(tally: Any) -> int:
    """A number of rows, given as such or as an entry of a token report."""
    return int(tally["count"] if isinstance(tally, Mapping) else tally)


def _usage_section(title: str, chat: bool, own_base: str) -> str:
    """How a reader loads the model; an adapter whose base is nowhere to be found is laid over a copy of their own."""
    prompt = '[{"role": "user", "content": "Why is the sky blue?"}]' if chat else '"The sky is blue because"'
    code = [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model="{title}")',
        f"answer = generate({prompt}, max_new_tokens=128, return_full_text=False)",
        'print(answer[0]["generated_text"])',
    ]
    if own_base:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("path/to/{own_base}")  # not on the Hub',
            f'model = PeftModel.from_pretrained(base, "{title}")',
        ]
    return "\n".join(["## How to use", "", "```python", *code, "```"])


def _again(recipe: Mapping[str, Any], plugins: Sequence[str]) -> str:
    """How the run is made again: the command, and where its files are found."""
    command = " ".join(["prefopt train recipe.yaml", *(f"--plugin {PLUGINS}/{name}" for name in plugins)])
    lines = [f"`{command}` makes this model again, from the same data."]
    if plugins:
        lines.append(f"The run folder keeps the code it was run with in `{PLUGINS}/`; a push leaves it there.")
    parts = [recipe, *(recipe.get("datasets") or []), *(recipe.get("targets") or [])]
    if files := [f"`{name}`" for part in parts for name in _names(part.get("data_files")) if "://" not in name]:
        lines.append(f"Run it in the folder that has {', '.join(files)}, with the path of the recipe.")
    return "\n\n".join(lines)


def _recipe_section(recipe: Mapping[str, Any], again: str) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    fence = "````" if "```" in text else "```"
    summary = "<details>\n<summary>The whole recipe, as resolved for this run</summary>"
    blocks = ("## Recipe", again, summary, f"{fence}yaml\n{text}\n{fence}", "</details>")
    return "\n\n".join(filter(None, blocks))


def _versions_section(results: Mapping[str, Any]) -> str:
    versions = [f"- {name} {version}" for name, version in sorted(results.get("versions", {}).items())]
    devices = [f"- device: {name}" for name in dict.fromkeys(results.get("devices", []))]
    return "\n".join(["## Versions", "", *versions, *devices]) if versions or devices else ""


def _papers_section(docs: Mapping[str, str]) -> str:
    papers = {number: name for name, doc in docs.items() for number in _ARXIV.findall(doc)}
    if not papers:
        return ""
    links = [f"- `{name}`: [arXiv {number}](https://arxiv.org/abs/{number})" for number, name in papers.items()]
    return "\n".join(["## Citation", "", "Please cite the paper of the algorithm:", "", *links])
