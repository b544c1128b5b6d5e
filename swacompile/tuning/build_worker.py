"""The process that builds candidates: requests name target, workload, config and the library to write."""

from pathlib import Path

from swacompile.target import target_named
from swacompile.tuning.config import Config
from swacompile.tuning.rules import rule_for
from swacompile.tuning.runner import without_torch
from swacompile.tuning.worker import Document, serve
from swacompile.workload import Workload


def answer(request: Document) -> Document:
    """Build one candidate; `message` is empty where that went well."""
    try:
        target, workload = target_named(request["target"]), Workload.parse(request["workload"])
        rule = rule_for(workload, target)
        rule.build(workload, Config.parse(request["config"]), target, Path(request["library"]))
    except Exception as error:  # whatever a build raises is this candidate's outcome, not the tuner's
        return {"message": f"{type(error).__name__}: {error}"}
    return {"message": ""}


if __name__ == "__main__":
    without_torch()
    serve(answer)
