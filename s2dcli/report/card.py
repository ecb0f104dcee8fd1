"""The model card of a checkpoint: `README.md` as the hub reads it, YAML front matter and the lineage in words.

All of it follows from the manifest, the evaluations of the run and the parent's own card, so a resumed run writes the same
bytes: no times, no host, and no folders above those of the run. What the parent's card says is somebody else's text: of its front
matter short plain strings of a few fields are carried over, and huggingface_hub writes them as YAML; of its prose nothing is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2dcli import console
from s2dcli.console import printable
from s2dcli.exports.evaluated import HUB_ID, portable
from s2dcli.files.checkpoint import ADAPTER
from s2dcli.files.command_line import command_line
from s2dcli.files.ledger import distinct_labels, unknown_parents, warnings
from s2dcli.files.manifest import UNKNOWN

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language", "tags", "base_model", "datasets")
LARGEST = 1 << 20  # bytes in which a parent's front matter must end; long lists of results take some 100 kB
DEEPEST = 20  # levels of nesting in it; the hub's formats have seven
LONGEST, MOST = 300, 100  # characters of a value that is carried over, values of a list
SHOWN_EVALS = 12  # rows of the table of evaluations
HASH = 12  # hexadecimal digits of a hash that are shown
DECIMALS = 2  # of per cent
TRAINED = ("model", "student")  # roles of the parent that a trainer starts from
_METHODS = {
    "prepare": "problems from data sets",
    "rollout": "sampled completions",
    "verify": "graded completions",
    "score": "distributions of a teacher on stored completions",
    "grpo": "sparse-reward reinforcement learning (GRPO)",
    "fkl-warmup": "forward-KL distillation on stored completions",
    "opd": "on-policy distillation: KL(student || teacher) on the student's own completions",
}
UNITS = ("problem", "update", "rollout", "token")  # of the counts that are told; times are not

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """What a run knows for the cards of its checkpoints, beside its manifest.

    `carried` is what `carried_over` gave of the parent; `datasets` names where the problems are from, `eval_datasets` those of
    the evaluations as (data set, split); `measured` are the problem_sha256 of these; `sampling` are the settings of the evaluations.
    """

    steps: int
    carried: dict[str, Any] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    eval_file: str = ""
    eval_datasets: Sequence[tuple[str, str]] = ()
    measured: frozenset[str] = frozenset()
    sampling: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, manifest: Record, evals: Sequence[Record]) -> None:
        """Write the card of the checkpoint in `folder`, and of its adapter if there is one, that `manifest` describes. Raises OSError."""
        lineage = Lineage(manifest)
        (folder / CARD).write_text(_joined(self._front_matter(lineage, evals), self._text(lineage, evals)), encoding="utf-8")
        if (folder / ADAPTER).is_dir():
            (folder / ADAPTER / CARD).write_text(_joined(self._adapter_front_matter(lineage), _adapter_text(lineage)), encoding="utf-8")

    def _front_matter(self, lineage: Lineage, evals: Sequence[Record]) -> Any:
        from huggingface_hub import ModelCardData

        base = lineage.base or self.carried.get("base_model")
        results = self._results(evals[-1]) if evals and evals[-1]["step"] == lineage.step else None
        datasets = {name for name in self.datasets if HUB_ID.fullmatch(name)}
        if lineage.continues:
            datasets.update(_listed(self.carried.get("datasets")))
        return ModelCardData(
            **self._kept("license", "license_name", "license_link", "language"),
            library_name="transformers",
            pipeline_tag="text-generation",
            **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
            datasets=sorted(datasets) or None,
            tags=[*_listed(self.carried.get("tags")), "s2d", lineage.manifest["command"]],
            model_name=lineage.name if results else None,
            eval_results=results,
        )

    def _adapter_front_matter(self, lineage: Lineage) -> Any:
        from huggingface_hub import ModelCardData

        parent = lineage.parent
        return ModelCardData(
            **self._kept("license", "license_name", "license_link", "language"),
            library_name="peft",
            pipeline_tag="text-generation",
            **({"base_model": parent["name"], "base_model_relation": "adapter"} if parent["revision"] else {}),
            tags=["lora", "s2d", lineage.manifest["command"]],
        )

    def _kept(self, *names: str) -> dict[str, Any]:
        return {name: self.carried[name] for name in names if name in self.carried}

    def _results(self, row: Record) -> list[Any]:
        """Return an evaluation as the hub's results, in per cent; the mean reward where the rewards have no notion of right."""
        from huggingface_hub import EvalResult

        right = row["avg_at_k"] is not None
        value, error = (row["avg_at_k"], row["se"]) if right else (row["mean_reward"], row["mean_reward_se"])
        if value is None:
            return []
        dataset, split = self.eval_datasets[0] if len(self.eval_datasets) == 1 else ("", "")
        name = dataset or portable(Path(self.eval_file).stem) or "problems"
        per_cent = 100 if right else 1
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                dataset_split=split or None,
                metric_type="accuracy" if right else "mean_reward",
                metric_name=f"avg@{row['k']}, per cent" if right else "mean reward",
                metric_value=round(per_cent * value, DECIMALS),
                metric_args={
                    "standard_error": round(per_cent * error, DECIMALS),
                    "problems": row["problems"],
                    "k": row["k"],
                    **self.sampling,
                },
            )
        ]

    def _text(self, lineage: Lineage, evals: Sequence[Record]) -> Iterator[str]:
        """Yield the paragraphs of the card."""
        manifest, parent = lineage.manifest, lineage.parent
        yield f"# {lineage.name}"
        where = f"step {lineage.step} of {self.steps}" if lineage.step < self.steps else f"step {lineage.step}, the last"
        yield (
            f"A language model in the format of transformers, trained from {lineage.title(parent)} by "
            f"`s2d {manifest['command']}`, {lineage.method(manifest)}; this is {where}. "
            f"Weights are saved in {manifest['saved']['dtype']}."
        )
        if "license" not in self.carried:
            yield "The licence of the model that it was trained from is not known here. Find it out before you publish this one."
        yield "## Lineage"
        lines = [f"{number}. {lineage.told(record)}" for number, record in enumerate(lineage.records, 1)]
        yield "\n".join([*lines[:-1], lines[-1] + " **This checkpoint.**"])
        yield "Hashes are the first digits of sha256; `s2d.json` beside this card has the whole of them, and all settings and versions."
        if unknown := unknown_parents(manifest):
            yield f"Unknown ancestry: {', '.join(map(code, unknown))} sampled what was learnt from, and what that has cost is not known."
        yield "## Labels"
        yield "\n".join(self._labels(lineage))
        if evals:
            yield "## Evaluation"
            yield from self._evaluations(lineage, evals)
        yield "## Reproduction"
        versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items() if number and name != "vllm")
        yield f"The commands that made it, in order ({printable(versions)}):"
        yield fenced("\n".join(lineage.commands()))

    def _labels(self, lineage: Lineage) -> Iterator[str]:
        distinct = len(distinct_labels(lineage.manifest))
        if not distinct:
            yield "No stage has learnt from a label."
        else:
            yield (
                f"{distinct:,} labelled problems were learnt from: as a reward, as a filter or as a target. "
                "Evaluations spend none.\n\n| stage | labels |\n|---|---:|"
            )
            for number, record in enumerate(lineage.records, 1):
                if record["labels"]:
                    yield f"| {number}. `s2d {record['command']}` | {len(record['labels']):,} |"
        for caution in lineage.cautions(self.measured):
            yield f"\nCaution, {code(caution)}"

    def _evaluations(self, lineage: Lineage, evals: Sequence[Record]) -> Iterator[str]:
        first = evals[0]
        names = " and ".join(code(f"{dataset} {split}".strip()) for dataset, split in self.eval_datasets if dataset)
        told = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in self.sampling.items())
        dtype = lineage.manifest["saved"]["dtype"]
        live = "" if dtype == "float32" else f", on the weights before they are rounded to {dtype}"
        yield (
            f"{first['problems']:,} problems{f' of {names}' if names else ''}, {first['k']} samples each ({told}), measured during training"
            f"{live}; ± is the standard error over problems."
        )
        shown = [*evals] if len(evals) <= SHOWN_EVALS else [first, *evals[1 - SHOWN_EVALS :]]
        right = any(row["avg_at_k"] is not None for row in shown)
        rewarded = any(row["mean_reward"] not in (None, row["avg_at_k"]) for row in shown)
        heads = ["step", *([f"avg@{first['k']}"] if right else []), *(["mean reward"] if rewarded else []), "truncated"]
        lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
        for row in shown:
            cells = [f"{row['step']:,}" + (" (before training)" if not row["step"] else "")]
            if right:
                cells.append("-" if row["avg_at_k"] is None else f"{100 * row['avg_at_k']:.1f} ± {100 * row['se']:.1f} %")
            if rewarded:
                cells.append("-" if row["mean_reward"] is None else f"{row['mean_reward']:.4g} ± {row['mean_reward_se']:.2g}")
            cells.append(f"{100 * row['truncated']:.1f} %")
            lines.append(f"| {' | '.join(cells)} |")
        yield "\n".join(lines)
        if len(shown) < len(evals):
            yield f"{len(evals) - len(shown)} evaluations between the first two rows are left out."
        if evals[-1]["step"] != lineage.step:
            yield f"The last of them is of step {evals[-1]['step']}; this checkpoint, of step {lineage.step}, was not measured itself."


class Lineage:
    """The records behind a checkpoint, and what is said of them."""

    def __init__(self, manifest: Record) -> None:
        self.manifest = manifest
        self.step = int(manifest["counts"]["steps"])
        self.parent = _trained(manifest)
        self.continues = self.parent["record"] in manifest["ancestors"]  # from a checkpoint that s2d made
        root, records = self.parent, manifest["ancestors"]
        while root["record"] in records and (older := _trained(records[root["record"]])):
            root = older
        self.base = root["name"] if root["revision"] else None  # only the hub's have one
        self.name = portable(f"{Path(root['name']).name}-{manifest['command']}") or manifest["command"]
        self.records = [*_in_order(manifest, records)]
        self._short = _short_names(self.records)

    def method(self, record: Record) -> str:
        if record["options"].get("hard_labels"):
            filtered = ", of those that are right" if record["options"].get("only_correct") else ""
            return f"supervised training on the tokens of stored completions{filtered}"
        return _METHODS.get(record["command"], "no stage that this version knows")

    def title(self, parent: Record) -> str:
        """Name a checkpoint, by where it lies and the hash of its weights."""
        step = f" at step {parent['step']}" if parent["step"] else ""
        revision = f", revision {code(parent['revision'][:HASH])}" if parent["revision"] else ""
        weights = f"weights {code(parent['weights_sha256'][:HASH])}" if parent["weights_sha256"] else "weights unknown"
        return f"{code(self._named(parent['name'] or '(no name)'))}{step} ({weights}{revision})"

    def told(self, record: Record) -> str:
        """Tell in a sentence what a stage has done."""
        origin = {"": ", not made by s2d", UNKNOWN: ", of unknown ancestry"}
        parents = [f"{parent['role']} {self.title(parent)}{origin.get(parent['record'], '')}" for parent in record["parents"]]
        inputs = [
            f"input {code(self._named(item['path']))}" + (f" (sha256 {code(item['sha256'][:HASH])})" if item["sha256"] else "")
            for item in record["inputs"]
        ]
        amounts = {**{unit: record["counts"].get(f"{unit}s", 0) for unit in UNITS}, "label": len(record["labels"])}
        counts = [f"{amount:,.0f} {unit}{'s' * (amount != 1)}" for unit, amount in amounts.items() if amount]
        told = "; ".join(filter(None, ("; ".join(parents), ", ".join(inputs), ", ".join(counts))))
        return f"`s2d {printable(record['command'])}`, {self.method(record)}: {told}."

    def commands(self) -> Iterator[str]:
        for record in self.records:
            for item in record["inputs"]:
                if item["path"] == "-":
                    digest = f", sha256 {item['sha256'][:HASH]}" if item["sha256"] else ""
                    yield f"# reads standard input{digest}"
            yield printable(shlex.join(map(self._named, command_line(record))))

    def cautions(self, measured: frozenset[str]) -> list[str]:
        """Return what should give pause, e.g. evaluation problems that were learnt from."""
        return [" ".join(self._short.get(word, word) for word in caution.split()) for caution in warnings(self.manifest, measured)]

    def _named(self, path: str) -> str:
        return self._short.get(path, path)


def _trained(record: Record) -> Record | None:
    return next((parent for parent in record["parents"] if parent["role"] in TRAINED), None)


def _in_order(record: Record, ancestors: Mapping[str, Record]) -> Iterator[Record]:
    """Yield the records behind a record and then itself, each after all that it was made from."""
    seen: set[str] = set()
    waiting = [(record, _made_from(record))]
    while waiting:
        current, names = waiting[-1]
        name = next((name for name in names if name in ancestors and name not in seen), None)
        if name is None:
            yield current
            waiting.pop()
        else:
            seen.add(name)
            waiting.append((ancestors[name], _made_from(ancestors[name])))


def _made_from(record: Record) -> Iterator[str]:
    return (item["record"] for item in (*record["parents"], *record["inputs"]))


def _short_names(records: Sequence[Record]) -> dict[str, str]:
    """Return a name for each absolute path of some records: its last parts, as many as tell it from the others."""
    texts: set[str] = set()
    for record in records:
        values = [value for option in record["options"].values() for value in (option if isinstance(option, list) else [option])]
        values += [*(parent["name"] for parent in record["parents"]), *(item["path"] for item in record["inputs"])]
        texts.update(value for value in values if isinstance(value, str))
    absolute = {text for text in texts if text.startswith("/") and len(Path(text).parts) > 1 and not text.startswith("/dev/")}
    paths = sorted(absolute, key=lambda text: (len(Path(text).parts), text))  # folders before what is in them
    taken = texts - absolute
    short: dict[str, str] = {}
    for path in paths:
        parts = Path(path).parts[1:]
        above = next((str(parent) for parent in Path(path).parents if str(parent) in short), None)
        names = [str(Path(*parts[-count:])) for count in range(1, len(parts) + 1)]
        if above is not None:
            names = [str(Path(short[above]) / Path(path).relative_to(above)), *names]
        short[path] = next((name for name in names if name not in taken), path)
        taken.add(short[path])
    return short


def _joined(data: Any, paragraphs: Iterator[str]) -> str:
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *paragraphs]) + "\n"


def _adapter_text(lineage: Lineage) -> Iterator[str]:
    yield f"# {lineage.name}-lora"
    yield (
        f"The LoRA adapter that `s2d {lineage.manifest['command']}` has trained for {lineage.title(lineage.parent)}; this is step "
        f"{lineage.step}. The checkpoint in the folder above holds it merged; its card has the lineage, the labels, the evaluations and "
        "the commands."
    )
    yield "peft's `PeftModel.from_pretrained(model, FOLDER)` applies it to that model, and to no other."


# Text of others


def code(text: str) -> str:
    """Return a text on one line as code of Markdown, in which nothing is markup."""
    text = " ".join(printable(text).split()) or " "
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(text: str) -> str:
    """Return lines of a shell as a block of Markdown that nothing in them ends."""
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks}bash\n{text}\n{ticks}"


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def carried_over(folder: Path) -> dict[str, Any]:
    """Return what the card of a parent, if it has one, says for its descendants: licence, languages, tags, base model, data sets.

    Warns of a front matter that cannot be read, and of values that are no plain text.
    """
    import yaml

    path = folder / CARD
    try:
        found = _front_matter(path) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:LONGEST]
        console.warn(f"{path}: licence and tags are not carried over to the model card: its front matter cannot be read ({reason})")
        return {}
    kept = {name: value for name in CARRIED if (value := found.get(name)) is not None and _is_plain(value)}
    if left := [name for name in CARRIED if found.get(name) is not None and name not in kept]:
        console.warn(f"{path}: not carried over to the model card, because it is no plain text: {', '.join(left)}")
    return kept


def _is_plain(value: Any) -> bool:
    """Whether a value is a short text, or a list of some, of one line and without control characters."""
    values = value if isinstance(value, list) else [value]
    return len(values) <= MOST and all(
        isinstance(text, str) and 0 < len(text) <= LONGEST and printable(text) == text and len(text.splitlines()) == 1 for text in values
    )


def _front_matter(path: Path) -> dict[str, Any]:
    """Read the YAML at the head of a card. Raises OSError, ValueError or YAMLError."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    with path.open("rb") as file:
        head = file.read(LARGEST)
    block = REGEX_YAML_BLOCK.search(head.decode("utf-8-sig", errors="replace"))
    if block is None:
        if len(head) == LARGEST:
            raise ValueError(f"it does not end within {LARGEST} bytes")
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(block[2], Loader=loader):
        if isinstance(event, yaml.AliasEvent):  # a few of these stand for any amount of memory
            raise ValueError("it refers to parts of itself (aliases)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    found = yaml.load(block[2], Loader=loader)
    if not isinstance(found, dict | None):
        raise ValueError("it is no mapping")
    return found or {}
