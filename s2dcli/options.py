"""Options that several commands share, each declared once as an Annotated alias."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SAMPLING = "Sampling"
TRAINING = "Training"
OUTPUT = "Output"
MODEL = "Model"


class Dtype(StrEnum):
    """Type of the forward computation; master weights and optimizer state are always float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


# Inputs
Problems = Annotated[str, typer.Argument(metavar="[PROBLEMS]", help="Problems, JSONL; - is standard input.", show_default=False)]
Rollouts = Annotated[str, typer.Argument(metavar="[ROLLOUTS]", help="Rollouts, JSONL; - is standard input.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**53 - 1, help="Seed of every random number that is drawn.")]

# Outputs
OutFile = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Output file; - is standard output.", rich_help_panel=OUTPUT)]
RunDir = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)]

# Models and prompts
Model = Annotated[str, typer.Option("--model", "-m", metavar="CKPT", help="Hub id, checkpoint folder or run folder.", show_default=False)]
Teacher = Annotated[str, typer.Option("--teacher", metavar="CKPT", help="Frozen teacher.", show_default=False)]
Student = Annotated[str, typer.Option("--student", metavar="CKPT", help="Student to train.", show_default=False)]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Compute type; auto: float32 on CPU, bfloat16 on a GPU.", rich_help_panel=MODEL)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.", rich_help_panel=MODEL)]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", metavar="plain|FILE", help="For models without a chat template.", rich_help_panel=MODEL),
]
ChatTemplateKwargs = Annotated[
    str,
    typer.Option("--chat-template-kwargs", metavar="JSON", help="Passed to the chat template, e.g. {\"enable_thinking\": false}.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.", rich_help_panel=MODEL)]

# Sampling
NumSamples = Annotated[int, typer.Option("-n", min=1, help="Rollouts per problem.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 is greedy.", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0 is all.", rich_help_panel=SAMPLING)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest completion, in tokens.", rich_help_panel=SAMPLING)]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option("--max-prompt-tokens", min=1, help="Problems with longer prompts are dropped and counted.", rich_help_panel=SAMPLING),
]
BatchTokens = Annotated[
    int,
    typer.Option("--sample-tokens", min=1, metavar="TOKENS", help="Cache positions that one sampling batch may fill (transformers engine).", rich_help_panel=SAMPLING),
]

# Grading
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Grading processes.", show_default="CPUs")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that one answer may take to grade.")]
MemoryLimit = Annotated[str, typer.Option("--memory-limit", metavar="SIZE", help="Memory that one grading process may use.")]
