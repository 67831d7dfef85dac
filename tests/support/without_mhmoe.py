"""
`python without_mhmoe.py JOBS.json`: a machine where `mhmoe` is not installed loads models with trust_remote_code=True.

JOBS is a list of {"source": folder or Hub id, "auto_class": name, "report": file, "resaved": folder}. The loaded model
or config is saved to the folder; the file gets its classes, config and, for the ids 3 to 12 or what "inputs", a file,
holds, its outputs, or "error".
"""

import json
import sys
import traceback

import torch
import transformers


class NotInstalled:
    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name.partition(".")[0] == "mhmoe":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load_and_save(source: str, auto_class: str, resaved: str, inputs: str | None = None) -> dict:
    loaded = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True)
    loaded.save_pretrained(resaved)
    report = {"class": type(loaded).__name__, "module": type(loaded).__module__}
    if auto_class == "AutoConfig":
        return report | {"config": loaded.to_dict()}
    with torch.no_grad():
        report["outputs"] = loaded(**torch.load(inputs) if inputs else {"input_ids": torch.arange(3, 13)[None]})[0]
    if loaded.can_generate():
        report["generation_config"] = loaded.generation_config.to_dict()
    return report | {"config": loaded.config.to_dict(), "config_class": type(loaded.config).__name__}


def main(jobs_file: str) -> None:
    sys.meta_path.insert(0, NotInstalled)
    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        try:
            report = load_and_save(job["source"], job["auto_class"], job["resaved"], job.get("inputs"))
        except Exception:  # one job's failure is that job's result
            report = {"error": traceback.format_exc()}
        torch.save(report, job["report"])
    assert "mhmoe" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])
