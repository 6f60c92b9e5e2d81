"""TEN medium, 322 M parameters: the original's recommended size.

accelerate launch train/medium.py --max_minutes 30  # whatever this machine has
accelerate launch train/medium.py --dataset openwebtext --max_steps 100000
accelerate launch --config_file accelerate_configs/cpu.yaml train/medium.py --max_minutes 30
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/medium.py
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train/medium.py --batch_size 64
accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml --num_processes 4 train/medium.py
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 4 train/medium.py --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/medium.py --max_minutes 30
wandb sweep sweeps/language.yaml  # searches the size that its `config` names; its output says how to start agents
"""

from train.language import main

if __name__ == "__main__":
    main("medium")
