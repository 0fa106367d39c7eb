//! What steers a training, key by key: each makes another LoRA than without it and than every other, and resumes exactly.

use std::collections::BTreeMap;

use flux_lora_tests::Workbench;

/// What all runs have: four steps of one picture.
const FEW: [&str; 5] = [
    "--set=train.steps=4",
    "--set=train.batch_size=1",
    "--set=train.gradient_accumulation_steps=1",
    "--set=lr_scheduler.warmup_steps=1",
    "--set=checkpoint.every=2",
];

/// Settings by what they are about, each one or several keys.
const OPTIONS: [&[&str]; 63] = [
    &["train.seed=8"],
    &["train.guidance=4"],
    &["train.batch_size=2"],
    &["train.gradient_accumulation_steps=2"],
    &["train.loss_type=mae"],
    &["train.loss_type=huber"],
    &["train.loss_type=huber", "train.huber_c=0.5"],
    &["train.loss_weighting=sigma_sqrt"],
    &["train.loss_weighting=cosmap"],
    &["train.loss_weighting=min_snr"],
    &["train.loss_weighting=min_snr", "train.min_snr_gamma=0.5"],
    &["train.timestep_sampling=none"],
    &["train.timestep_sampling=mode"],
    &["train.timestep_sampling=mode", "train.mode_scale=0.5"],
    &["train.timestep_sampling=uniform"],
    &["train.timestep_sampling=sigmoid"],
    &["train.timestep_sampling=sigmoid", "train.sigmoid_scale=2"],
    &["train.timestep_sampling=shift", "train.shift=3"],
    &["train.timestep_sampling=flux_shift", "train.shift=1"],
    &["train.shift=flux"],
    &["train.logit_mean=1"],
    &["train.logit_std=2"],
    &["lr_scheduler.name=constant", "lr_scheduler.warmup_steps=0"],
    &["lr_scheduler.name=constant_with_warmup"],
    &["lr_scheduler.name=linear"],
    &["lr_scheduler.num_cycles=1"],
    &[
        "lr_scheduler.name=cosine_with_restarts",
        "lr_scheduler.num_cycles=2",
    ],
    &["lr_scheduler.name=polynomial", "lr_scheduler.power=2"],
    &[
        "lr_scheduler.name=polynomial",
        "lr_scheduler.power=2",
        "lr_scheduler.lr_end=1e-4",
    ],
    &["lr_scheduler.name=rex"],
    &["lr_scheduler.warmup_steps=3"],
    &["optimizer.learning_rate=1e-3"],
    &["optimizer.max_grad_norm=1e-4"],
    &["optimizer.weight_decay=0.5"],
    &["optimizer.betas=[0.5, 0.9]"],
    &["optimizer.eps=1e-3"],
    &["optimizer.name=adam"],
    &["optimizer.name=adamw8bit"],
    &["optimizer.name=sgd"],
    &["optimizer.name=lion"],
    &["optimizer.name=adafactor"],
    &["optimizer.name=prodigy"],
    &["optimizer.name=schedule_free_adamw"],
    &["optimizer.betas=[0.9, 0.5]"],
    &["optimizer.amsgrad=true", "optimizer.betas=[0.9, 0.5]"],
    &["optimizer.name=sgd", "optimizer.momentum=0.9"],
    &["optimizer.loraplus_lr_ratio=4"],
    &["optimizer.lr_pattern={'single_transformer_blocks.*' = 0.5}"],
    &["lora.target_modules=attention"],
    &["lora.target_modules=all-linear"],
    &["lora.target_modules=kohya-default"],
    &["lora.train_double_block_indices='0'"],
    &["lora.train_single_block_indices=none"],
    &["lora.exclude_modules=['to_q']"],
    &["lora.rank_pattern={'attn.to_q' = 2}"],
    &["lora.alpha_pattern={'attn.to_q' = 2.0}"],
    &["lora.use_rslora=true"],
    &["lora.use_dora=true"],
    &["lora.lora_dropout=0"],
    &["lora.init_lora_weights=orthogonal"],
    &["dataset.caption_dropout=0.95"],
    &["dataset.random_flip=false"],
    &["dataset.bucket_step=32"],
];

#[test]
fn every_option_makes_another_lora_and_resumes_exactly() {
    let bench = Workbench::new();
    bench.train_ok("plain", "flex", &FEW);
    let plain = bench.result("plain");
    let mut found = BTreeMap::from([(plain.checkpoint_lora.clone(), "nothing".to_string())]);
    for option in OPTIONS {
        let option = option
            .iter()
            .map(|key| format!("--set={key}"))
            .collect::<Vec<_>>();
        let settings = FEW.into_iter().chain(option.iter().map(String::as_str));
        let settings: Vec<&str> = settings.collect();
        let what = option.join(" ");
        let run = format!("run-{}", found.len());
        bench.copy_run("plain", &run, |name| name == "cache");
        bench.train_ok(&run, "flex", &settings);
        let expected = bench.result(&run);
        let again = format!("{run}-again");
        bench.copy_run(&run, &again, |name| {
            ["cache", "metrics.jsonl", "ckpt-0000000002"].contains(&name)
        });
        bench.train_ok(&again, "flex", &[&settings[..], &["--resume"]].concat());
        bench.result(&again).assert_same(&expected, &what);
        if let Some(other) = found.insert(expected.checkpoint_lora, what.clone()) {
            panic!("{what} trains what {other} trains");
        }
    }
    assert_eq!(found.len(), OPTIONS.len() + 1);

    // Other names of the same, and what changes no bit.
    for same in [
        "--set=train.loss_type=l2",
        "--set=lora.target_modules=diffusers-default",
        "--set=train.divergence_factor=100",
        "--set=checkpoint.keep=2",
        "--set=logging.tensorboard=false",
        "--set=memory.recompute=all",
        "--set=memory.base=stream",
    ] {
        bench.train_ok(same, "flex", &[&FEW[..], &[same]].concat());
        let found = bench.result(same);
        assert!(found.checkpoint_lora == plain.checkpoint_lora, "{same}");
        assert_eq!(found.metrics, plain.metrics, "{same}");
    }
}
