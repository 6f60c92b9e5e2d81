"""TEN nano, 33 M parameters: a prototype in minutes, also on a CPU.

accelerate launch train/nano.py --max_minutes 5  # whatever this machine has
accelerate launch train/nano.py --dataset tinystories
accelerate launch --config_file accelerate_configs/cpu.yaml train/nano.py --max_minutes 5
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/nano.py
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train/nano.py --batch_size 64
accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml --num_processes 4 train/nano.py --batch_size 64
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 4 train/nano.py --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/nano.py --max_minutes 5
wandb sweep sweeps/language.yaml  # searches the size that its `config` names; its output says how to start agents
python train/sample.py runs/nano/RUN --prompt "def main("
"""

from train.language import main

if __name__ == "__main__":
    main("nano")
