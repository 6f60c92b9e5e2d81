"""TEN micro, 86 M parameters: between a prototype and the size of the small GPT-2.

accelerate launch train/micro.py --max_minutes 30  # whatever this machine has
accelerate launch train/micro.py --dataset wikitext-103
accelerate launch --config_file accelerate_configs/cpu.yaml train/micro.py --max_minutes 30
accelerate launch --config_file accelerate_configs/single_gpu.yaml train/micro.py
accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train/micro.py --batch_size 64
accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml --num_processes 4 train/micro.py --batch_size 64
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 4 train/micro.py --batch_size 64
accelerate launch --config_file accelerate_configs/mps.yaml train/micro.py --max_minutes 30
wandb sweep sweeps/language.yaml  # searches the size that its `config` names; its output says how to start agents
"""

from train.language import main

if __name__ == "__main__":
    main("micro")
