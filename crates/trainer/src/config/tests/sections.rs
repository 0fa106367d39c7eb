//! What values must be, section by section.

use std::path::Path;

use toml::Table;

use super::{assert_refused, read, read_with};
use crate::config::{LossType, RunConfig};

/// What is written, and what is said of it.
const OUT_OF_RANGE: &str = r#"
dataset.resolution = 500 -> must be a multiple of 16 between 16 and 8192, found 500: take 496 or 512
dataset.resolution = 0 -> must be a multiple of 16 between 16 and 8192, found 0: take 16
dataset.bucket_step = 24 -> must be a multiple of 16 between 16 and 8192, found 24: take 16 or 32
dataset.caption_extension = ".txt" -> must be a file extension such as "txt", found ".txt"
dataset.caption_extension = "png" -> must be a file extension such as "txt", found "png"
dataset.caption_dropout = 1.5 -> must be between 0 and 1, found 1.5
dataset.max_sequence_length = 513 -> must be between 1 and 512, found 513
lora.r = 0 -> must be between 1 and 65536, found 0
lora.lora_alpha = -1 -> must be above 0, found -1
lora.rank_pattern = { a = 0 } -> must be between 1 and 65536, found 0
lora.alpha_pattern = { a = inf } -> must be above 0, found inf
lora.target_modules = [] -> must name at least one layer
lora.lora_dropout = 1.0 -> must be at least 0 and below 1, found 1
lora.init_from = "~/x.safetensors" -> `~` is not expanded to your home folder here: write the path in full
lora.init_from = "$HOME/x.safetensors" -> variables are not expanded here: write the path in full
model.vae = "C:\temp\new" -> has a control character in it: in double quotes \t is a tab and \n a line break, so write a Windows path in single quotes or with /
optimizer.learning_rate = 0 -> must be above 0, found 0
optimizer.learning_rate = nan -> must be above 0, found NaN
optimizer.betas = [0.9, 1.0] -> must be at least 0 and below 1, found 1
optimizer.eps = 0.0 -> must be above 0, found 0
optimizer.weight_decay = -0.1 -> must be at least 0, found -0.1
optimizer.max_grad_norm = 0 -> must be above 0, or "none" for no clipping, found 0
lr_scheduler.warmup_steps = 5 -> has no effect with name = "constant", found 5: use "constant_with_warmup"
lr_scheduler.num_cycles = 0 -> must be above 0, found 0
lr_scheduler.power = 2 -> has no effect but with name = "polynomial"
train.huber_c = 0.1 -> has no effect but with loss_type = "huber"
train.min_snr_gamma = 5 -> has no effect but with loss_weighting = "min_snr"
train.steps = 0 -> must be at least 1, found 0
train.batch_size = 0 -> must be between 1 and 65536, found 0
train.gradient_accumulation_steps = 0 -> must be between 1 and 65536, found 0
train.guidance = -1 -> must be at least 0, found -1
train.logit_mean = inf -> must be a finite number, found inf
train.logit_std = 0 -> must be above 0, found 0
train.mode_scale = 2 -> must be between -1 and 1.75, found 2
train.sigmoid_scale = 0 -> must be above 0, found 0
train.shift = 0 -> must be above 0, or "flux", found 0
train.divergence_factor = 1 -> must be above 1, or "none" to go on whatever the loss, found 1
checkpoint.every = 0 -> must be at least 1, found 0
checkpoint.keep = 1 -> must be at least 2, so that one is left when the newest is damaged, found 1
sample.prompts = [] -> required, but not given: list at least one prompt
sample.every = 0 -> must be at least 1, found 0
sample.num_inference_steps = 0 -> must be between 1 and 65536, found 0
sample.guidance_scale = -1 -> must be at least 0, found -1
sample.height = 8 -> must be a multiple of 16 between 16 and 8192, found 8: take 16
sample.width = 100000 -> must be a multiple of 16 between 16 and 8192, found 100000: take 8192
"#;

#[test]
fn out_of_range() {
    for case in OUT_OF_RANGE.trim().lines() {
        let (assignment, problem) = case.split_once(" -> ").expect("two halves");
        let (key, _) = assignment.split_once(" = ").expect("a value");
        let (section, line) = assignment.split_once('.').expect("a section");
        let prompts = if section == "sample" && key != "sample.prompts" {
            "\nprompts = [\"a cat\"]"
        } else {
            ""
        };
        assert_refused(
            &format!("[{section}]\n{line}{prompts}"),
            &format!("`{key}` in run.toml:2: {problem}"),
        );
    }
}

#[test]
fn each_optimizer_has_its_own_options_and_defaults() {
    for (written, rate, rest) in [
        ("adamw", 1e-4, "betas eps weight_decay"),
        ("adamw8bit", 1e-4, "betas eps min_8bit_size weight_decay"),
        ("adam", 1e-4, "amsgrad betas eps weight_decay"),
        ("sgd", 1e-3, "dampening momentum nesterov weight_decay"),
        ("lion", 1e-4, "betas weight_decay"),
        (
            "adafactor",
            1e-2,
            "beta2_decay d eps relative_step scale_parameter weight_decay",
        ),
        (
            "prodigy",
            1.0,
            "betas d0 d_coef decouple eps safeguard_warmup slice_p use_bias_correction weight_decay",
        ),
        (
            "schedule_free_adamw",
            2.5e-3,
            "betas eps r warmup_steps weight_decay weight_lr_power",
        ),
    ] {
        let config = read(&format!("[optimizer]\nname = \"{written}\"")).expect("known");
        assert_eq!(config.optimizer.learning_rate, rate, "{written}");
        let text = config.to_toml().expect("TOML holds it");
        let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
        assert_eq!(again.expect("what was written"), config);
        let table: Table = toml::from_str(&text).expect("what was written");
        let options = table["optimizer"].as_table().expect("a section").keys();
        let common = ["name", "learning_rate", "max_grad_norm"];
        let mut options: Vec<_> = options
            .filter(|key| !common.contains(&key.as_str()))
            .cloned()
            .collect();
        options.sort();
        assert_eq!(options.join(" "), rest, "{written}");
    }
    assert_refused(
        "[optimizer]\nname = \"lion\"\nmomentum = 0.5",
        "`optimizer.momentum` in run.toml:3: has no effect with name = \"lion\", whose options are `betas` or `weight_decay`",
    );
    assert_refused(
        "[optimizer]\nname = \"adafactor\"\neps = 1e-8",
        "`optimizer.eps` in run.toml:3: invalid type: number `0.00000001`, expected two numbers",
    );
    assert_refused(
        "[optimizer]\nname = \"prodigy\"\nslice_p = 0",
        "`optimizer.slice_p` in run.toml:3: invalid value: integer `0`, expected a whole number above 0",
    );
    assert_refused(
        "[optimizer]\nname = \"prodigy\"\ngrowth_rate = 0.5",
        "`optimizer.growth_rate` in run.toml:3: must be above 1, found 0.5",
    );
    assert_refused(
        "[optimizer]\nname = \"schedule_free_adamw\"\nbetas = [0.0, 0.9]",
        "`optimizer.betas` in run.toml:3: must be above 0, found 0",
    );
    assert_refused(
        "[optimizer]\nname = \"sgd\"\nnesterov = true",
        "`optimizer.nesterov` in run.toml:3: needs a `momentum` above 0, and no `dampening`",
    );
    assert_refused(
        "[optimizer]\nname = \"sgd\"\ndampening = 0.5",
        "`optimizer.dampening` in run.toml:3: has no effect without momentum: set `momentum`",
    );
}

#[test]
fn schedules_have_the_defaults_of_their_name() {
    let schedule = |text: &str| read(&format!("[lr_scheduler]\n{text}")).map(|c| c.lr_scheduler);
    let restarts = schedule("name = \"cosine_with_restarts\"").expect("good");
    assert_eq!(restarts.num_cycles, Some(1.0));
    let cosine = schedule("name = \"cosine\"").expect("good");
    assert_eq!(cosine.num_cycles, Some(0.5));
    let polynomial = schedule("name = \"polynomial\"").expect("good");
    assert_eq!(
        (polynomial.power, polynomial.lr_end),
        (Some(1.0), Some(1e-7))
    );
    assert_refused(
        "[lr_scheduler]\nname = \"cosine_with_restarts\"\nnum_cycles = 1.5",
        "`lr_scheduler.num_cycles` in run.toml:3: must be a whole number of at least 1 with name = \"cosine_with_restarts\", found 1.5",
    );
    assert_refused(
        "[lr_scheduler]\nname = \"polynomial\"\nlr_end = 1e-3",
        "`lr_scheduler.lr_end` in run.toml:3: must be below optimizer.learning_rate = 0.0001, found 0.001",
    );
}

#[test]
fn data_options_refuse_nonsense() {
    for (section, problem) in [
        (
            "[[dataset.folders]]\npath = \"a\"",
            "`dataset.folders` in run.toml:1: cannot be given with `dataset.path`: name that folder among them",
        ),
        (
            "[dataset]\nresolution = []",
            "`dataset.resolution` in run.toml:2: must name at least one",
        ),
        (
            "[dataset]\nresolution = [512, 512]",
            "`dataset.resolution` in run.toml:2: must name each only once, found 512 twice",
        ),
        (
            "[dataset]\nresolution = [512, 500]",
            "`dataset.resolution` in run.toml:2: must be a multiple of 16 between 16 and 8192, found 500: take 496 or 512",
        ),
        (
            "[dataset]\nrandom_crops = 0",
            "`dataset.random_crops` in run.toml:2: must be between 1 and 64, found 0",
        ),
        (
            "[dataset]\nkeep_tokens = 1",
            "`dataset.keep_tokens` in run.toml:2: has no effect without `shuffle_caption` or `caption_tag_dropout_rate`",
        ),
        (
            "[dataset]\ncaption_separator = \" \"",
            "`dataset.caption_separator` in run.toml:2: must be what stands between tags, such as \",\"",
        ),
        (
            "[dataset]\ntrigger_word = \"\"",
            "`dataset.trigger_word` in run.toml:2: must be a word, found \"\"",
        ),
        (
            "[lora]\ntrain_double_block_indices = \"3-1\"",
            "`lora.train_double_block_indices` in run.toml:2: must be \"all\", \"none\", or numbers and ranges as in \"0-3,7\", found \"3-1\"",
        ),
        (
            "[lora]\ntrain_double_block_indices = \"none\"\ntrain_single_block_indices = \"none\"",
            "`lora.train_single_block_indices` in run.toml:3: leaves no block to adapt, with none of the double ones either",
        ),
        (
            "[optimizer]\nname = \"prodigy\"\nloraplus_lr_ratio = 4.0",
            "`optimizer.loraplus_lr_ratio` in run.toml:3: cannot be used with name = \"prodigy\", which has one rate for all parameters",
        ),
        (
            "[optimizer]\nlr_pattern = { to_q = -1.0 }",
            "`optimizer.lr_pattern` in run.toml:2: must be at least 0, found -1",
        ),
        (
            "[ema]\ndecay = 1.0",
            "`ema.decay` in run.toml:2: must be above 0 and below 1, found 1",
        ),
        (
            "[validation]\nevery = 5",
            "`validation.path` in run.toml: or `validation.share` is required: name a folder of held-out pictures, or the share of the dataset to hold out",
        ),
        (
            "[validation]\nshare = 0.5\nmask = \"masks\"",
            "`validation.mask` in run.toml:3: has no effect without `validation.path`: a share of the dataset has what is beside it there",
        ),
        (
            "[validation]\npath = \"held\"\nreference = \"held\"",
            "`validation.reference` in run.toml:3: is `validation.path`: put these pictures into a folder of their own",
        ),
    ] {
        assert_refused(section, problem);
    }
    let folders = "[dataset]\n[[dataset.folders]]\npath = \"a\"\n[[dataset.folders]]\npath = \"b\"\nrepeats = 3\nloss_weight = 0.5";
    let config = RunConfig::from_toml(folders, Path::new("run.toml"), &["model.path=flux".into()]);
    let config = config.expect("good");
    let again = RunConfig::from_toml(&config.to_toml().expect("TOML"), Path::new("again"), &[]);
    assert_eq!(again.expect("what was written"), config);
    assert_eq!(config.dataset.folders[1].repeats, 3);
    let with = |more: &str| {
        let text = format!("{folders}\n{more}");
        RunConfig::from_toml(&text, Path::new("run.toml"), &["model.path=flux".into()])
    };
    let config = with("reference = \"c\"").expect("one with references, one without");
    assert_eq!(config.dataset.all_folders()[1].reference, Some("c".into()));
    for (more, problem) in [
        (
            "reference = \"b\"",
            "`reference` is `path`: put these pictures into a folder of their own",
        ),
        ("reference = \"\"", "`reference` required, but not given"),
        (
            "reference = \"c\"\nmask = \"d\"",
            "`reference` cannot be together with `mask`: no model reads both",
        ),
        (
            "mask = \"c\"",
            "must have a `mask` each or none, found 1 in 2",
        ),
    ] {
        let error = with(more).expect_err("refused").to_string();
        assert_eq!(error, format!("`dataset.folders` in run.toml:2: {problem}"));
    }
    for key in ["reference", "mask"] {
        let text = folders.replacen("[dataset]", &format!("[dataset]\n{key} = \"c\""), 1);
        let error = RunConfig::from_toml(&text, Path::new("run.toml"), &["model.path=flux".into()]);
        assert_eq!(
            error.expect_err("refused").to_string(),
            format!(
                "`dataset.{key}` in run.toml:2: cannot be together with `dataset.folders`: give each of these its own `{key}`"
            )
        );
    }
}

#[test]
fn rates_have_factors_by_layer_and_for_the_second_factor() {
    let config = read(
        "[optimizer]\nloraplus_lr_ratio = 16\nlr_pattern = { \"single_transformer_blocks.*\" = 0.5 }",
    );
    let config = config.expect("good").optimizer;
    let path = |layer: &str, factor: &str| format!("{layer}.weight.adapter.default.{factor}");
    let paths = [
        path("transformer_blocks.0.attn.to_q", "lora_A"),
        path("transformer_blocks.0.attn.to_q", "lora_B"),
        path("single_transformer_blocks.0.attn.to_q", "lora_A"),
        path("single_transformer_blocks.0.attn.to_q", "lora_B"),
    ];
    let factors = config.rate_factors(&paths).expect("all are used");
    let factor = |index: usize| factors.get(&paths[index]).copied();
    assert_eq!(
        [factor(0), factor(1), factor(2), factor(3)],
        [None, Some(16.0), Some(0.5), Some(8.0)]
    );
    let error = config
        .rate_factors(&paths[..2])
        .expect_err("no single block")
        .to_string();
    assert!(
        error.contains("matches no layer that is trained"),
        "{error}"
    );
}

#[test]
fn presets_of_noise_sampling_have_their_shift() {
    assert_refused(
        "[train]\ntimestep_sampling = \"shift\"",
        "`train.shift` in run.toml: must be another number than 1 with timestep_sampling = \"shift\": kohya's discrete_flow_shift, 3 there unless given",
    );
    assert_refused(
        "[train]\ntimestep_sampling = \"flux_shift\"\nshift = 3.0",
        "`train.shift` in run.toml:3: has no effect with timestep_sampling = \"flux_shift\", which has the shift of the image's size",
    );
    read("[train]\ntimestep_sampling = \"flux_shift\"").expect("good");
    let huber = read("[train]\nloss_type = \"huber\"\nhuber_c = 0.2").expect("good");
    assert_eq!(huber.train.huber_c, Some(0.2));
    assert_eq!(
        read("[train]\nloss_type = \"l1\"")
            .expect("good")
            .train
            .loss_type,
        LossType::Mae
    );
}

#[test]
fn factors_of_a_file_are_not_made_anew() {
    assert_refused(
        "[lora]\ninit_from = \"x.safetensors\"\ninit_lora_weights = \"pissa_niter_4\"",
        "`lora.init_from` in run.toml:2: has factors of its own, which `lora.init_lora_weights` pissa_niter_4 would make anew: remove one of the two",
    );
}

#[test]
fn a_default_can_be_out_of_range_too() {
    let error = read_with("", &["dataset.resolution=32"]).expect_err("the step is larger");
    assert_eq!(
        error.to_string(),
        "`dataset.bucket_step` in run.toml: must be at most dataset.resolution = 32, found 64"
    );
}

#[test]
fn a_program_gets_the_same_rules() {
    let mut config = read("").expect("a good configuration");
    config.validate().expect("still good");
    config.train.seed = u64::MAX;
    assert_eq!(
        config.validate().expect_err("too large").to_string(),
        "`train.seed`: must be at most 9223372036854775807, the largest number TOML can hold, found 18446744073709551615"
    );
    config.diff(&config).expect_err("TOML cannot hold it");
}

#[test]
fn a_warm_up_as_long_as_the_run_is_said() {
    let warnings = |warmup: u64, steps: u64| {
        let text = format!(
            "[lr_scheduler]\nname = \"cosine\"\nwarmup_steps = {warmup}\n[train]\nsteps = {steps}"
        );
        read(&text).expect("a good configuration").warnings()
    };
    assert_eq!(warnings(4, 5), [""; 0]);
    assert_eq!(warnings(0, 1), [""; 0]);
    let said = warnings(5, 5).concat();
    assert!(
        said.ends_with("the learning rate, 1.0e-4, rises to 8.0e-5 and never reaches it"),
        "{said}"
    );
    let said = warnings(100, 1).concat();
    assert!(
        said.ends_with("is 0 throughout, so nothing is learned"),
        "{said}"
    );
}

#[test]
fn blocks_are_not_streamed_where_their_weights_are_kept_or_needed_at_the_start() {
    assert_refused(
        "[memory]\nbase = \"stream\"\nrecompute = \"none\"",
        "`memory.recompute` in run.toml:3: must be \"all\" or \"auto\" with base = \"stream\": what is kept of a block keeps its weights",
    );
    assert_refused(
        "[memory]\nbase = \"stream\"\n[lora]\nuse_dora = true",
        "`memory.base` in run.toml:2: cannot be \"stream\": this adapter starts from the base weights, which have to be in memory for that; use \"resident\"",
    );
}
