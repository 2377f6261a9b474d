"""Names of options in other trainers, and what to type here instead.

The names are those of transformers, TRL, PEFT, LLaMA-Factory, axolotl, ms-swift, Unsloth, mlx-lm,
torchtune and lm-evaluation-harness, with underscores.
"""

ADAPTERS = ("adapter_name_or_path", "lora_path", "adapter_path", "peft_path", "peft_model_id",
            "peft", "lora_model_dir", "adapters", "resume_adapter_file")  # fmt: skip
DTYPES = ("dtype", "torch_dtype", "compute_dtype", "mixed_precision")
NAMES = {  # option here -> names elsewhere
    "model": ("model_name_or_path", "model_name", "model_id", "model_path", "base_model",
              "pretrained_model_name_or_path", "pretrained", "model_args", "checkpoint"),
    "revision": ("model_revision", "base_revision"),
    "data": ("dataset", "datasets", "dataset_name", "dataset_path", "dataset_dir", "data_path",
             "data_files", "data_file", "train_file", "train_files", "train_data",
             "training_data", "training_file", "task", "tasks"),
    "data_revision": ("dataset_revision",),
    "columns": ("column_mapping", "dataset_text_field", "prompt_column", "response_column",
                "prompt_feature", "completion_feature"),
    "out": ("output_dir", "output", "out_dir", "output_path", "save_dir", "save_path",
            "logging_dir"),
    "rank": ("lora_r", "lora_rank", "r", "peft_r"),
    "alpha": ("lora_alpha", "peft_alpha", "lora_scaling", "lora_scale"),
    "dropout": ("lora_dropout",),
    "targets": ("lora_target", "lora_targets", "target_modules", "lora_target_modules",
                "lora_modules", "lora_attn_modules"),
    "rslora": ("use_rslora", "rs_lora"),
    "dora": ("use_dora", "peft_use_dora"),
    "adapter": ADAPTERS,
    "from_adapter": ADAPTERS,
    "epochs": ("num_train_epochs", "num_epochs", "n_epochs", "train_epochs", "epoch"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size", "micro_batch_size", "batch",
                   "per_device_batch_size", "per_device_eval_batch_size", "eval_batch_size", "bs",
                   "b"),
    "grad_accum": ("gradient_accumulation_steps", "grad_accum_steps", "grad_accumulation_steps",
                   "accumulation_steps", "gradient_accumulation"),
    "learning_rate": ("lr", "max_lr", "peak_lr"),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    "lora_plus_ratio": ("loraplus_lr_ratio", "lora_plus_lr_ratio", "loraplus_ratio"),
    "warmup": ("warmup_ratio", "warmup_fraction", "warmup_proportion"),
    "weight_decay": ("wd",),
    "clip": ("max_grad_norm", "grad_clip", "gradient_clipping", "clip_grad_norm", "max_norm",
             "gradient_clip_val"),
    "max_length": ("max_seq_length", "max_seq_len", "cutoff_len", "block_size", "seq_len",
                   "model_max_length", "sequence_len", "sequence_length", "seq_length", "max_len"),
    "limit": ("max_samples", "max_train_samples", "max_eval_samples", "num_samples",
              "num_examples"),
    "max_steps": ("iters", "max_iters", "num_steps", "max_train_steps", "total_steps"),
    "seed": ("random_seed", "data_seed"),
    "validation_share": ("val_size", "val_split", "val_set_size", "val_ratio", "eval_ratio",
                         "validation_split", "validation_split_percentage",
                         "split_dataset_ratio", "test_size"),
    "patience": ("early_stopping_patience", "early_stopping"),
    "stop_on": ("metric_for_best_model",),
    "max_new_tokens": ("max_tokens", "max_gen_toks", "max_completion_tokens",
                       "generation_max_length"),
    "precision": DTYPES,
    "dtype": DTYPES,
    "device": ("device_map", "accelerator"),
    "checkpoint_activations": ("gradient_checkpointing", "use_gradient_checkpointing",
                               "grad_checkpoint", "activation_checkpointing"),
    "compile": ("torch_compile", "use_compile"),
    "track": ("report_to", "wandb", "tensorboard", "trackio", "with_tracking"),
    "shots": ("num_fewshot", "n_shot", "few_shot", "num_shots"),
    "ask": ("prompt", "question", "query"),
    "system": ("default_system", "system_prompt", "system_message"),
    "chat_template": ("template", "chat_template_path", "prompt_template"),
}  # fmt: skip
ADVICE = {  # what to do -> options elsewhere that have no equivalent here
    "use --base-precision nf4 or int8; --precision sets the dtype that it is computed in":
        ("load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "qlora", "use_4bit",
         "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bits",
         "quant_bits", "quant_type", "quantization_method", "double_quant", "double_quantization"),
    "use --precision bf16": ("bf16", "bfloat16"),
    "use --precision fp16": ("fp16", "float16", "half"),
    "use --precision fp32": ("fp32", "float32"),
    "leave it out: a run resumes when its command is repeated":
        ("resume", "resume_from_checkpoint", "resume_from"),
    "give another --out": ("overwrite_output_dir", "overwrite"),
    "use --evals-per-epoch: validations are evenly spaced in each epoch":
        ("eval_steps", "eval_strategy", "evaluation_strategy", "steps_per_eval", "val_batches"),
    "use --save-every: seconds between checkpoints":
        ("save_steps", "save_strategy", "save_total_limit", "save_interval"),
    "use --warmup: a fraction of all steps": ("warmup_steps", "num_warmup_steps"),
    "leave it out: micro-batches are flat, without padding":
        ("packing", "sample_packing", "eval_sample_packing", "neat_packing", "group_by_length",
         "pad_to_max_length", "pad_to_sequence_len"),
    "leave it out: every step is logged to metrics.jsonl in the run's folder":
        ("logging_steps", "logging_strategy", "log_interval", "wandb_project",
         "steps_per_report", "plot_loss"),
    "leave it out: only LoRA adapters are trained, on the assistant's answers":
        ("finetuning_type", "fine_tune_type", "train_type", "sft_type", "use_peft", "use_lora",
         "tuner_type", "stage", "do_train", "train", "modules_to_save", "lora_modules_to_save",
         "additional_target", "lora_bias", "full_finetune"),
    "leave it out: all layers get adapters, and --targets chooses the projections":
        ("num_layers", "lora_layers"),
    "use torchrun --nproc-per-node N train.py, with --shard to spread the base over the ranks":
        ("deepspeed", "fsdp", "num_gpus", "n_gpu", "gpus", "num_processes", "nproc_per_node",
         "nnodes", "local_rank"),
    "leave it out: the kind of attention follows from the device":
        ("flash_attn", "flash_attention", "attn_implementation", "use_flash_attention_2",
         "xformers_attention"),
    "leave it out: the optimizer is AdamW, with betas and epsilon of its own":
        ("optim", "optimizer", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "beta1",
         "beta2", "eps"),
    "leave it out: the best adapter of a run is kept in best/":
        ("load_best_model_at_end", "greater_is_better", "do_eval"),
    "leave it out: a test or valid file in the folder of --data is found by its name":
        ("eval_dataset", "eval_data_path", "eval_file", "validation_file", "test_file"),
    "leave it out: it changes nothing here":
        ("overwrite_cache", "preprocessing_num_workers", "dataloader_num_workers", "num_workers",
         "num_proc", "dataset_num_proc", "remove_unused_columns", "lazy_preprocess",
         "ddp_timeout", "ddp_find_unused_parameters", "use_unsloth",
         "use_liger_kernel", "enable_liger_kernel", "liger_kernel", "gradient_checkpointing_kwargs",
         "use_reentrant", "model_type", "tokenizer_type", "fan_in_fan_out",
         "lora_fan_in_fan_out"),
    "leave it out: it is not supported":
        ("neftune_noise_alpha", "label_smoothing", "label_smoothing_factor", "use_pissa",
         "pissa_init", "push_to_hub", "hub_model_id", "streaming"),
    'leave it out: the assistant\'s turns are trained on, except for those with "weight": 0':
        ("train_on_inputs", "train_on_prompt", "completion_only_loss", "assistant_only_loss",
         "mask_prompt", "mask_history"),
    "use --config FILE, with the options as JSON, as in a run's config.json":
        ("config_file", "yaml"),
}  # fmt: skip
