"""Case `lora_from_script` of kind `lora_forward`: the file that diffusers' training script saves, for the model of pipeline_dev.

Made by make_lora.py and load_in_diffusers.py. Its `lora.safetensors` is also the file that our trainer continues in tests.
"""

import tempfile

from common import PARITY, case_folder
from load_in_diffusers import main
from make_lora import make

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = PARITY / "pipeline_dev" / "model"
        main(model, make(model, folder), case_folder("lora_from_script"))
