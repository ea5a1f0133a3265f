from __future__ import annotations

import subprocess
import sys


def test_opening_a_model_imports_no_framework_and_nothing_it_does_not_need():
    code = (
        "import sys\n"
        "from fuserve.checkpoints import load_tokenizer, open_checkpoint\n"
        "checkpoint = open_checkpoint('demo')\n"
        "tokenizer = load_tokenizer(checkpoint)\n"
        "tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "heavy = ('torch', 'transformers', 'gguf', 'huggingface_hub', 'safetensors')\n"
        "print(*(name for name in heavy if name in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == ""
