"""HTEN xlarge, 1.2 B parameters: eigenstates that step 1, 2, 4 and 8 tokens at a time.

accelerate launch train/xlarge.py --max_steps 2 --batch_size 1 --seq_len 256  # two real steps in 24 GiB without a GPU
accelerate launch train/xlarge.py --plan  # what the default batch takes, and what would fit here
accelerate launch train/xlarge.py --dataset finewebedu --max_steps 100000
accelerate launch --config_file accelerate_configs/cpu.yaml train/xlarge.py --max_minutes 30
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/xlarge.py
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train/xlarge.py --batch_size 64
accelerate launch --config_file accelerate_configs/deepspeed_zero3.yaml --num_processes 4 train/xlarge.py
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 4 train/xlarge.py --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/xlarge.py --max_minutes 30
wandb sweep sweeps/language.yaml  # searches the size that its `config` names; its output says how to start agents
"""

from train.language import main

if __name__ == "__main__":
    main("xlarge")
