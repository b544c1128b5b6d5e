"""A build worker whose outcome depends on row_heads: kernels that are right, wrong, crash or hang, and builds that do."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from swacompile.tuning.config import Config
from swacompile.tuning.worker import serve

KINDS = {1: "good", 2: "good", 3: "wrong", 4: "good", 5: "crashing", 6: "hanging", 8: "unbuildable"}
BODIES = {"wrong": "return 0;", "crashing": "__builtin_trap();", "hanging": "for (;;) { }"}


def answer(request):
    values = Config.parse(request["config"]).as_dict()
    kind, library = KINDS[values["row_heads"]], Path(request["library"])
    if values["row_keys"] == 16 and kind == "good":
        os.kill(os.getpid(), 11)
    if values["row_keys"] == 512 and kind == "good":
        time.sleep(1000)
    if kind == "unbuildable":
        return {"message": "ValueError: no such tile"}
    if kind == "good":
        shutil.copyfile(os.environ["SWACOMPILE_TEST_KERNEL"], library)
        return {"message": ""}
    name = "__tvm_ffi_" + library.name.split("-")[0]
    code = f"int {name}(void* s, const void* a, int n, void* r) {{ {BODIES[kind]} }}"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=code, text=True, check=True)
    return {"message": ""}


if __name__ == "__main__":
    serve(answer)
