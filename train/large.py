"""HTEN large, 523 M parameters: eigenstates that step 1, 2 and 4 tokens at a time.

accelerate launch train/large.py --max_minutes 30  # whatever this machine has
accelerate launch train/large.py --dataset finewebedu --max_steps 100000
accelerate launch --config_file accelerate_configs/cpu.yaml train/large.py --max_minutes 30
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/large.py
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train/large.py --batch_size 64
accelerate launch --config_file accelerate_configs/deepspeed_zero3.yaml --num_processes 4 train/large.py --batch_size 64
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 4 train/large.py --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/large.py --max_minutes 30
wandb sweep sweeps/language.yaml  # searches the size that its `config` names; its output says how to start agents
"""

from train.language import main

if __name__ == "__main__":
    main("large")
