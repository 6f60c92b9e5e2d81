"""TEN nano, 33 M parameters: a prototype in minutes, also on a CPU.

accelerate launch train/nano.py --max_minutes 5                                              # CPU or one GPU
accelerate launch --config_file accelerate_configs/cpu.yaml train/nano.py --max_minutes 5    # CPU, whatever is there
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/nano.py --epochs 1
accelerate launch --config_file accelerate_configs/multi_gpu.yaml train/nano.py --epochs 1 --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/nano.py --max_minutes 5
python train/sample.py runs/nano/RUN --prompt "def main("
"""

from train.language import main

if __name__ == "__main__":
    main("nano")
