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

from prefopt.report.plots import FOLDER, OVERVIEW
from prefopt.report.results import RESULTS_FILE, plain, without_secrets, write_whole

CARD_FILE = "README.md"

# In this order at the head of the results table; any other metric follows by name.
FIRST_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "entropy")
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
) -> Path:
    """Write `README.md` into a finished run's folder, from its `results.json` and its plots.

    `loss_docs` maps the name of each loss to its docstring, whose title and arXiv numbers are quoted.
    """
    folder = Path(folder)
    results_file = folder / RESULTS_FILE
    text = model_card(
        recipe,
        json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {},
        sorted((folder / FOLDER).glob("*.png")),
        base_model,
        title=str(recipe.get("hub_model_id") or folder.resolve().name),
        loss_docs=loss_docs,
        license=license,
        adapter=(folder / "adapter_config.json").exists(),
        chat=(folder / "chat_template.jinja").exists(),
    )
    path = folder / CARD_FILE
    write_whole(path, text)
    return path


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
) -> str:
    """The text of a card: a YAML header the Hub reads, then Markdown.

    `results` may hold `train` and `eval` (final figures by metric), `data` (a token report as a dict for each split,
    or just `{"kept": n, "dropped": {reason: n}}`), `versions` and `devices`; whatever is absent is left out. `plots`
    are linked as `plots/NAME`. `base_model` is the recipe's model where not given.
    """
    recipe, results = publishable(recipe), publishable(results)
    base = base_model or recipe.get("model_name_or_path")
    docs = {name: (loss_docs or {}).get(name, "") for name in loss_names(recipe)}
    sections = [
        f"# {publishable(title)}",
        _introduction(_start(base), _datasets(recipe), docs, adapter),
        _results_section(results),
        _curves_section(plots),
        _data_section(results.get("data", {})),
        _usage_section(publishable(title), chat),
        _recipe_section(recipe),
        _versions_section(results),
        _papers_section(docs),
    ]
    header = _header(base, recipe, list(docs), license, adapter)
    return f"---\n{header}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def publishable(value: Any) -> Any:
    """A copy that may leave the machine: without secrets, and with the last part alone of each absolute path."""
    return _without_paths(plain(without_secrets(value)))


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
        base_model=base if _on_hub(base) else None,
        datasets=[name for name in _datasets(recipe) if _on_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["prefopt", *losses],
    )
    return str(data.to_yaml())


def _on_hub(name: str | None) -> bool:
    """Whether this reads as a name on the Hub: the header may hold nothing else, or the Hub refuses the card."""
    return bool(name) and _HUB_NAME.match(str(name)) is not None and not Path(str(name)).exists()


def _start(base: str | None) -> str:
    if not base:
        return "from scratch"
    return "from " + (f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{publishable(base)}`")


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """Data sets and files that a recipe trains on."""
    parts = [recipe.get("dataset_name"), recipe.get("data_files")]
    parts += [entry.get("path") or entry.get("data_files") for entry in recipe.get("datasets") or []]
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
    names = [path.name for path in plots]
    if not names:
        return ""
    shown = [OVERVIEW] if OVERVIEW in names else names
    images = [f"![{Path(name).stem}]({FOLDER}/{name})" for name in shown]
    links = [f"[{Path(name).stem}]({FOLDER}/{name})" for name in names if name not in shown]
    single = [f"One by one: {', '.join(links)}."] if links else []
    return "\n\n".join(["## Curves", *images, *single])


def _data_section(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    lines = ["## Data", "", "| split | rows used | left out |", "| --- | ---: | --- |"]
    for split, counts in data.items():
        dropped = {reason: _count(tally) for reason, tally in counts.get("dropped", {}).items()}
        left_out = [f"{count} ({reason.replace('_', ' ')})" for reason, count in dropped.items() if count]
        lines.append(f"| {split} | {counts.get('kept', '')} | {', '.join(left_out) or 'none'} |")
    return "\n".join(lines)


def _count(tally: Any) -> int:
    """A number of rows, given as such or as an entry of a token report."""
    return int(tally["count"] if isinstance(tally, Mapping) else tally)


def _usage_section(title: str, chat: bool) -> str:
    prompt = '[{"role": "user", "content": "Why is the sky blue?"}]' if chat else '"The sky is blue because"'
    code = (
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model="{title}")\n'
        f"answer = generate({prompt}, max_new_tokens=128, return_full_text=False)\n"
        'print(answer[0]["generated_text"])'
    )
    return f"## How to use\n\n```python\n{code}\n```"


def _recipe_section(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    fence = "````" if "```" in text else "```"
    return (
        "## Recipe\n\n<details>\n<summary>The whole recipe, as resolved for this run</summary>\n\n"
        f"{fence}yaml\n{text}\n{fence}\n\n</details>"
    )


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
