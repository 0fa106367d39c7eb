use super::read::{fields_of, sections};
use super::*;
use lora_core::training::optimizers::OptimizerConfig;

/// The two keys every configuration needs, given as overrides so that the text may open any section.
const REQUIRED: [&str; 2] = ["model.path=flux", "dataset.path=cats"];

fn read_with(text: &str, overrides: &[&str]) -> Result<RunConfig, ConfigError> {
    let overrides = REQUIRED.iter().chain(overrides).map(ToString::to_string);
    let overrides: Vec<String> = overrides.collect();
    RunConfig::from_toml(text, Path::new("run.toml"), &overrides)
}

fn read(text: &str) -> Result<RunConfig, ConfigError> {
    read_with(text, &[])
}

#[track_caller]
fn assert_refused(text: &str, message: &str) {
    let error = read(text).expect_err("the configuration is bad");
    assert_eq!(error.to_string(), message);
}

#[track_caller]
fn assert_set_refused(set: &str, message: &str) {
    let error = read_with("", &[set]).expect_err("the override is bad");
    assert_eq!(error.to_string(), message);
}

#[test]
fn two_paths_are_enough() {
    let config = read("").expect("a good configuration");
    let mut expected = RunConfig::default();
    expected.model.path = "flux".into();
    expected.dataset.path = "cats".into();
    assert_eq!(config, expected);
    assert_eq!(config.sample, None);
}

const EVERYTHING: &str = r#"
[model]
path = "flux"
transformer = "flux1-dev.safetensors"
vae = "ae.safetensors"

[dataset]
path = "cats"
resolution = 768
bucket_step = 32
random_flip = true
caption_extension = "caption"
caption_dropout = 0.1
max_sequence_length = 256

[lora]
r = 4
lora_alpha = 8
target_modules = "all-linear"
exclude_modules = ["proj_out"]
rank_pattern = { "attn.to_k" = 8, "single.*" = 2 }
alpha_pattern = { "attn.to_k" = 1.5 }
use_rslora = true
use_dora = true
lora_dropout = 0.05
init_lora_weights = true
init_from = "first.safetensors"

[optimizer]
name = "adamw"
learning_rate = 2e-5
betas = [0.8, 0.99]
eps = 1e-6
weight_decay = 0
max_grad_norm = "none"

[lr_scheduler]
name = "constant_with_warmup"
warmup_steps = 10
num_cycles = 1.5

[train]
steps = 7
batch_size = 2
gradient_accumulation_steps = 3
seed = 9223372036854775807
guidance = 3.5
timestep_sampling = "logit_normal"
logit_mean = -0.5
logit_std = 0.5
mode_scale = 0.8
sigmoid_scale = 2.0
shift = "flux"
loss_weighting = "sigma_sqrt"
divergence_factor = "none"

[memory]
limit = "8GiB"
base = "resident"
recompute = 3

[checkpoint]
every = 5
keep = 3

[logging]
tensorboard = false
csv = false

[sample]
prompts = ["a cat", "two\ncats, \"ü\""]
every = 4
at_start = false
num_inference_steps = 8
guidance_scale = 0
height = 768
width = 512
seed = 1
"#;

fn everything() -> RunConfig {
    RunConfig::from_toml(EVERYTHING, Path::new("run.toml"), &[]).expect("a good configuration")
}

#[test]
fn every_key_is_read() {
    let config = everything();
    assert_eq!(
        config.model.vae.as_deref(),
        Some(Path::new("ae.safetensors"))
    );
    assert_eq!(
        config.lora.target_modules,
        Some(Targets::Pattern("all-linear".into()))
    );
    assert_eq!(
        config.lora.exclude_modules,
        Some(Targets::List(vec!["proj_out".into()]))
    );
    assert_eq!(config.lora.rank_pattern.get("single.*"), Some(2));
    assert_eq!(
        config.lora.init_lora_weights,
        Some(InitLoraWeights::Default)
    );
    assert_eq!(config.optimizer.max_grad_norm, None);
    assert!(
        matches!(config.optimizer.rule, OptimizerConfig::Adamw(options) if options.weight_decay == 0.0)
    );
    assert_eq!(
        config.lr_scheduler.name,
        LrSchedulerName::ConstantWithWarmup
    );
    assert_eq!(config.train.seed, i64::MAX as u64);
    assert_eq!(
        config.train.timestep_sampling,
        TimestepSampling::LogitNormal
    );
    assert_eq!(config.train.shift, TimestepShift::Flux);
    assert_eq!(config.train.loss_weighting, LossWeighting::SigmaSqrt);
    assert!(!config.logging.tensorboard && !config.logging.csv);
    assert_eq!(
        config.sample.expect("a section").prompts[1],
        "two\ncats, \"ü\""
    );
}

#[test]
fn what_is_written_reads_back_the_same() {
    for config in [read("").expect("a good configuration"), everything()] {
        let text = config.to_toml().expect("TOML holds it");
        let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
        let again = again.expect("what was written");
        assert_eq!(again, config);
        assert_eq!(again.to_toml().expect("TOML holds it"), text);
        assert_eq!(
            again.digest().expect("TOML holds it"),
            config.digest().expect("the same")
        );
    }
    assert_ne!(
        read("").expect("good").digest().expect("TOML holds it"),
        everything().digest().expect("TOML holds it")
    );
}

#[test]
fn every_default_is_written_out() {
    let text = read("")
        .expect("a good configuration")
        .to_toml()
        .expect("TOML holds it");
    let table: Table = toml::from_str(&text).expect("what was written");
    for (section, keys) in sections() {
        if ["sample", "validation", "ema"].contains(&section) {
            continue; // absent: none
        }
        let keys = match section {
            // The options of other optimizers, and factors on the rate, are absent.
            "optimizer" => ["name", "learning_rate", "betas", "eps"]
                .into_iter()
                .chain(["weight_decay", "max_grad_norm"])
                .collect(),
            _ => keys,
        };
        for key in keys {
            let optional = [
                "transformer",
                "vae",
                "reference",
                "mask",
                "target_modules", // the family's
                "reference",
                "mask",
                "folders",
                "skip",
                "random_crops",
                "trigger_word",
                "shuffle_caption",
                "keep_tokens",
                "caption_tag_dropout_rate",
                "caption_separator",
                "caption_variants",
                "train_double_block_indices",
                "train_single_block_indices",
                "exclude_modules",
                "rank_pattern",
                "alpha_pattern",
                "init_from",
                "limit",
                // Written only where they differ: configurations of runs that began before them keep their digest.
                "peft_type",
                "layers_to_transform",
                "layers_pattern",
                "init_lora_weights",
                "decompose_both",
                "decompose_factor",
                "loss_type",
                "huber_c",
                "min_snr_gamma",
                "power",
                "lr_end",
            ];
            let written = table[section].get(key).is_some();
            assert_eq!(written, !optional.contains(&key), "{section}.{key}");
        }
    }
}

#[test]
fn floats_survive_to_the_bit() {
    let mut config = read("").expect("a good configuration");
    for rate in [1e-4, 0.1 + 0.2, 1e-300, f64::MIN_POSITIVE, 5e-324, 1e300] {
        config.optimizer.learning_rate = rate;
        let text = config.to_toml().expect("TOML holds it");
        let again = RunConfig::from_toml(&text, Path::new("config.toml"), &[]);
        let again = again.expect("what was written").optimizer.learning_rate;
        assert_eq!(again.to_bits(), rate.to_bits(), "{rate}");
    }
}

// Mistakes in the file

#[test]
fn a_required_path_is_missing() {
    let error = RunConfig::from_toml("[model]\npath = \"flux\"\n", Path::new("run.toml"), &[])
        .expect_err("no dataset");
    assert_eq!(
        error.to_string(),
        "`dataset.path` in run.toml: required, but not given"
    );
    let error = RunConfig::from_toml("", Path::new("run.toml"), &[]).expect_err("no model");
    assert_eq!(
        error.to_string(),
        "`model.path` in run.toml: required, but not given"
    );
}

#[test]
fn not_toml() {
    assert_refused(
        "[train\nsteps = 1",
        "run.toml:1:7: unclosed table, expected `]`",
    );
    assert_refused(
        "[train]\nsteps = 1\nsteps = 2",
        "run.toml:3:1: duplicate key",
    );
    assert_refused(
        "[train]\nsteps = ",
        "run.toml:2:9: string values must be quoted, expected literal string",
    );
}

#[test]
fn what_people_write_for_toml_gets_the_mend() {
    let backslash = "in double quotes a backslash starts an escape: write a Windows path in single quotes, as in 'C:\\Users\\me', or with / in place of each backslash";
    for (text, ends) in [
        ("[dataset]\npath = \"C:\\Users\\me\"", backslash),
        ("[dataset]\npath = \"D:\\my pictures\"", backslash),
        ("[dataset]\npath = \"C:\\pics\\\"\n", backslash),
        (
            "[dataset]\nrandom_flip = True",
            "write true or false in lower case",
        ),
        (
            "[optimizer]\nmax_grad_norm = None",
            "leave the key out for its default",
        ),
        (
            "[train]\nsteps: 5",
            "this is TOML, not YAML: write key = value",
        ),
    ] {
        let error = read(text).expect_err("no TOML").to_string();
        assert!(error.starts_with("run.toml:2:"), "{error}");
        assert!(error.ends_with(ends), "{error}");
    }
    // Both are paths already.
    let config = read("[lora]\ninit_from = 'C:\\Users\\me'\n").expect("single quotes");
    assert_eq!(config.lora.init_from, Some(PathBuf::from("C:\\Users\\me")));
}

#[test]
fn a_byte_order_mark_and_line_ends_of_windows_are_fine() {
    let config = read("\u{feff}[train]\r\nsteps = 7\r\n").expect("a good configuration");
    assert_eq!(config.train.steps, 7);
}

#[test]
fn a_number_in_quotes_is_told_from_a_word() {
    assert_refused(
        "[optimizer]\nlearning_rate = \"1e-4\"",
        "`optimizer.learning_rate` in run.toml:2: invalid type: string \"1e-4\", expected a number: write 1e-4 without quotes",
    );
    assert_refused(
        "[train]\nsteps = \"500\"",
        "`train.steps` in run.toml:2: invalid type: string \"500\", expected a whole number: write 500 without quotes",
    );
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
fn deep_nesting_is_refused() {
    let text = format!("x = {}", "[".repeat(100_000));
    let error = read(&text).expect_err("too deep").to_string();
    assert!(error.starts_with("run.toml:1:"), "{error}");
}

#[test]
fn unknown_key() {
    assert_refused(
        "[optimizer]\nlearnin_rate = 1e-3",
        "unknown key `optimizer.learnin_rate` in run.toml:2: did you mean `learning_rate`?",
    );
    assert_refused(
        "[lora]\nr = 4\n\n\"a\\nb\" = 1",
        "unknown key `lora.a\\nb` in run.toml:4: did you mean `lora_alpha`?",
    );
}

#[test]
fn unknown_key_that_lives_elsewhere() {
    assert_refused(
        "[train]\nlearning_rate = 1e-3",
        "unknown key `train.learning_rate` in run.toml:2: did you mean `optimizer.learning_rate`?",
    );
    assert_refused(
        "batch_size = 1",
        "unknown key `batch_size` in run.toml:1: did you mean `train.batch_size`?",
    );
    assert_refused(
        "batchsize = 1",
        "unknown key `batchsize` in run.toml:1: did you mean `train.batch_size`?",
    );
}

#[test]
fn unknown_key_that_other_trainers_use() {
    assert_refused(
        "[lora]\nrank = 8",
        "unknown key `lora.rank` in run.toml:2: did you mean `r`?",
    );
    assert_refused(
        "[train]\nlr = 8",
        "unknown key `train.lr` in run.toml:2: did you mean `optimizer.learning_rate`?",
    );
}

#[test]
fn other_names_lead_to_keys_that_exist() {
    let sections = sections();
    let exists = |full: &str| {
        let (section, key) = full.split_once('.').expect("section.key");
        sections
            .iter()
            .any(|(name, keys)| *name == section && keys.contains(&key))
    };
    for (other, full) in OTHER_NAMES {
        assert!(exists(full), "{full}");
        assert!(
            !sections.iter().any(|(_, keys)| keys.contains(&other)),
            "{other}"
        );
    }
    assert!(
        MAY_CHANGE_ON_RESUME
            .iter()
            .filter(|key| !key.ends_with('.'))
            .all(|key| exists(key))
    );
}

#[test]
fn the_list_of_sections_is_complete() {
    let names = sections().map(|(section, _)| section);
    assert_eq!(names, fields_of::<RunConfig>());
    assert_eq!(fields_of::<CheckpointSection>(), ["every", "keep"]);
    assert!(sections().iter().all(|(_, keys)| !keys.is_empty()));
}

#[test]
fn unknown_section() {
    assert_refused(
        "[optimiser]\nname = \"adamw\"",
        "unknown section `optimiser` in run.toml:1: did you mean `optimizer`?",
    );
}

#[test]
fn a_section_that_is_not_one() {
    assert_refused(
        "train = 5",
        "`train` in run.toml:1: is a section, to be written as [train]",
    );
    assert_refused(
        "[[train]]\nsteps = 5",
        "`train` in run.toml:1: is a section, to be written as [train]",
    );
}

#[test]
fn wrong_type() {
    assert_refused(
        "[optimizer]\nlearning_rate = \"fast\"",
        "`optimizer.learning_rate` in run.toml:2: invalid type: string \"fast\", expected a number",
    );
    assert_refused(
        "[train]\nsteps = 1.5",
        "`train.steps` in run.toml:2: invalid type: number `1.5`, expected a whole number",
    );
    assert_refused(
        "[train]\nbatch_size = -1",
        "`train.batch_size` in run.toml:2: invalid value: integer `-1`, expected a whole number",
    );
    assert_refused(
        "[train]\nseed = 9223372036854775808",
        "run.toml:2:8: u64 value was too large",
    );
    assert_refused(
        "[dataset]\nrandom_flip = 1",
        "`dataset.random_flip` in run.toml:2: invalid type: integer `1`, expected a boolean",
    );
    assert_refused(
        "[memory]\nrecompute = \"some\"",
        "`memory.recompute` in run.toml:2: invalid value: string \"some\", expected \"auto\", \"all\", \"none\" or a number of blocks",
    );
    assert_refused(
        "[memory]\nlimit = 8",
        "`memory.limit` in run.toml:2: invalid type: integer `8`, expected a number with its unit, such as \"8GiB\" or \"500 MB\"",
    );
    assert_refused(
        "[train]\nrecompute = 1",
        "unknown key `train.recompute` in run.toml:2: did you mean `memory.recompute`?",
    );
    assert_refused(
        "[model]\nvae = 1",
        "`model.vae` in run.toml:2: invalid type: integer `1`, expected a path",
    );
    assert_refused(
        "[optimizer]\nbetas = [0.9]",
        "`optimizer.betas` in run.toml:2: invalid length 1, expected an array of length 2",
    );
    assert_refused(
        "[optimizer]\nbetas = [0.9, 0.99, 0.999]",
        "`optimizer.betas` in run.toml:2: invalid length 3, expected 2 elements in sequence",
    );
    assert_refused(
        "[lora]\ntarget_modules = 5",
        "`lora.target_modules` in run.toml:2: expected a string or a list of strings",
    );
    assert_refused(
        "[lora]\nrank_pattern = { \"a.b\" = \"x\" }",
        "`lora.rank_pattern.a.b` in run.toml:2: invalid type: string \"x\", expected a whole number",
    );
    assert_refused(
        "[sample]\nprompts = \"a cat\"",
        "`sample.prompts` in run.toml:2: invalid type: string \"a cat\", expected a sequence",
    );
}

#[test]
fn wrong_choice() {
    assert_refused(
        "[optimizer]\nname = \"adamz\"",
        "`optimizer.name` in run.toml:2: unknown value `adamz`, expected one of `adamw`, `adamw8bit`, `adam`, `sgd`, `lion`, `adafactor`, `prodigy`, `schedule_free_adamw`",
    );
    assert_refused(
        "[train]\ntimestep_sampling = \"logit-normal\"",
        "`train.timestep_sampling` in run.toml:2: unknown value `logit-normal`, expected one of `none`, `logit_normal`, `mode`, `sigmoid`, `uniform`, `shift`, `flux_shift`",
    );
    assert_refused(
        "[optimizer]\nmax_grad_norm = \"off\"",
        "`optimizer.max_grad_norm` in run.toml:2: invalid value: string \"off\", expected a number or \"none\"",
    );
    assert_refused(
        "[train]\nshift = true",
        "`train.shift` in run.toml:2: invalid type: boolean `true`, expected a number or \"flux\"",
    );
    assert_refused(
        "[lora]\ninit_lora_weights = \"loftq\"",
        "`lora.init_lora_weights` in run.toml:2: invalid value: string \"loftq\", expected true, false, \"gaussian\", \"orthogonal\", \"olora\", \"pissa\" or \"pissa_niter_N\" with a number N",
    );
}

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
    ] {
        assert_refused(section, problem);
    }
    let folders = "[dataset]\n[[dataset.folders]]\npath = \"a\"\n[[dataset.folders]]\npath = \"b\"\nrepeats = 3\nloss_weight = 0.5";
    let config = RunConfig::from_toml(folders, Path::new("run.toml"), &["model.path=flux".into()]);
    let config = config.expect("good");
    let again = RunConfig::from_toml(&config.to_toml().expect("TOML"), Path::new("again"), &[]);
    assert_eq!(again.expect("what was written"), config);
    assert_eq!(config.dataset.folders[1].repeats, 3);
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

// --set

#[test]
fn overrides_are_toml_values_or_bare_strings() {
    let config = read_with(
        "[train]\nsteps = 5\n[optimizer]\nmax_grad_norm = 2",
        &[
            "train.steps=7",
            "optimizer.learning_rate = 1e-5",
            "optimizer.betas=[0.5, 0.6]",
            "optimizer.max_grad_norm=none",
            "dataset.path=../my cats",
            "lora.target_modules=.*to_[kq]",
            "lora.rank_pattern.\"a.b\"=3",
            "sample.prompts=['a = b']",
            "train.steps=8",
        ],
    )
    .expect("good overrides");
    assert_eq!(config.train.steps, 8);
    assert_eq!(config.optimizer.learning_rate, 1e-5);
    assert!(
        matches!(config.optimizer.rule, OptimizerConfig::Adamw(options) if options.betas == [0.5, 0.6])
    );
    assert_eq!(config.optimizer.max_grad_norm, None);
    assert_eq!(config.dataset.path, Path::new("../my cats"));
    assert_eq!(
        config.lora.target_modules,
        Some(Targets::Pattern(".*to_[kq]".into()))
    );
    assert_eq!(config.lora.rank_pattern.get("a.b"), Some(3));
    assert_eq!(config.sample.expect("a section").prompts, ["a = b"]);
}

#[test]
fn overrides_can_give_the_required_paths() {
    let set = ["model.path=m".to_owned(), "dataset.path=d".to_owned()];
    let config = RunConfig::from_toml("", Path::new("run.toml"), &set).expect("complete");
    assert_eq!(config.model.path, Path::new("m"));
}

#[test]
fn override_of_an_unknown_key() {
    assert_set_refused(
        "optimizer.learnin_rate=1",
        "unknown key `optimizer.learnin_rate` in --set: did you mean `learning_rate`?",
    );
    assert_set_refused(
        "optimiser.lr=1",
        "unknown section `optimiser` in --set: did you mean `optimizer`?",
    );
}

#[test]
fn override_with_a_bad_value() {
    assert_set_refused(
        "train.steps=many",
        "`train.steps` in --set: invalid type: string \"many\", expected a whole number",
    );
    assert_set_refused(
        "train.steps=0",
        "`train.steps` in --set: must be at least 1, found 0",
    );
    assert_set_refused(
        "train.steps=1\nsection.x=2",
        "`train.steps` in --set: invalid type: string \"1\\nsection.x=2\", expected a whole number",
    );
}

#[test]
fn malformed_override() {
    for set in [
        "steps=1",
        "train.steps",
        "=1",
        ".=1",
        "train.=1",
        "a.b\nc.d=1",
        "[train]\nsteps=1",
        "",
    ] {
        let shown = set.replace('\n', "\\n");
        assert_set_refused(
            set,
            &format!("`--set {shown}`: write it as section.key=value"),
        );
    }
    // A list whose quotes the shell has taken is no pattern.
    assert_set_refused(
        "lora.target_modules=[to_q, to_k]",
        "`--set lora.target_modules=[to_q, to_k]`: the value is no TOML: quote each string, and the whole for the shell, as in --set 'section.key=[\"a\", \"b\"]'",
    );
    let error = read_with("", &["dataset.path=\"C:\\Users\""]).expect_err("an escape");
    assert!(
        error.to_string().contains("a backslash starts an escape"),
        "{error}"
    );
    assert_set_refused(
        "model.path.x=1",
        "`--set model.path.x=1`: `path` is not a section",
    );
}

#[test]
fn any_missing_character_is_survived_in_one_line() {
    for (at, c) in EVERYTHING.char_indices() {
        let text = format!("{}{}", &EVERYTHING[..at], &EVERYTHING[at + c.len_utf8()..]);
        match RunConfig::from_toml(&text, Path::new("run.toml"), &[]) {
            Ok(config) => {
                let text = config.to_toml().expect("TOML holds it");
                let again = RunConfig::from_toml(&text, Path::new("run.toml"), &[]);
                assert_eq!(again.expect("what was written"), config);
            }
            Err(error) => {
                let line = error.to_string();
                assert!(line.contains("run.toml") && !line.contains('\n'), "{line}");
            }
        }
    }
}

// Files

#[test]
fn paths_start_at_the_files_folder() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let root = fs::canonicalize(folder.path()).expect("it exists");
    fs::create_dir(root.join("runs")).expect("make folder");
    let file = root.join("runs/run.toml");
    let text = "[model]\npath = \"../models/./flux\"\nvae = \"/vae\"\n[dataset]\npath = \"cats\"\n[lora]\ninit_from = \"a/../b\"";
    fs::write(&file, text).expect("write file");
    let config = RunConfig::load(&file, &[]).expect("a good configuration");
    assert_eq!(config.model.path, root.join("models/flux"));
    assert_eq!(config.model.vae.as_deref(), Some(Path::new("/vae")));
    assert_eq!(config.dataset.path, root.join("runs/cats"));
    assert_eq!(config.lora.init_from, Some(root.join("runs/a/../b")));

    // by another name, and from the copy kept with a run
    let roundabout = root.join("runs/../runs/./run.toml");
    assert_eq!(
        RunConfig::load(&roundabout, &[]).expect("the same file"),
        config
    );
    let copy = root.join("config.toml");
    fs::write(&copy, config.to_toml().expect("TOML holds it")).expect("write file");
    assert_eq!(
        RunConfig::load(&copy, &[]).expect("a good configuration"),
        config
    );
}

#[test]
fn missing_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("run.toml");
    let error = RunConfig::load(&file, &[]).expect_err("no file");
    assert_eq!(
        error.to_string(),
        format!("cannot read `{}`", file.display())
    );
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn file_that_is_not_text() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("run.toml");
    for (bytes, problem) in [
        (vec![0xff; 10], "it is not UTF-8 text"),
        (
            b"\xff\xfe[\0".to_vec(),
            "it is UTF-16 text: save it as UTF-8",
        ),
        (vec![b'#'; (1 << 20) + 1], "it is larger than 1 MiB"),
    ] {
        fs::write(&file, bytes).expect("write file");
        let error = RunConfig::load(&file, &[]).expect_err("not a configuration");
        let expected = format!("`{}` is not a run configuration: {problem}", file.display());
        assert_eq!(error.to_string(), expected);
    }
}

// Changes

#[test]
fn the_order_of_patterns_is_kept_and_counts() {
    let config = |pattern| read(&format!("lora.rank_pattern = {pattern}")).expect("good");
    let (ba, ab) = (config("{ b = 1, a = 2 }"), config("{ a = 2, b = 1 }"));
    let first = ba
        .lora
        .rank_pattern
        .iter()
        .next()
        .map(|(pattern, _)| pattern);
    assert_eq!(first, Some("b"));
    assert_ne!(
        ba.digest().expect("TOML holds it"),
        ab.digest().expect("TOML holds it")
    );
    let changes = ba.diff(&ab).expect("TOML holds it");
    assert_eq!(
        (changes.len(), changes[0].old.as_str()),
        (1, "{ b = 1, a = 2 }")
    );
}

#[test]
fn equal_configurations_have_no_changes() {
    assert_eq!(everything().diff(&everything()).expect("TOML holds it"), []);
}

#[test]
fn changes_name_both_values_and_whether_they_are_allowed() {
    let old = read("[lora.rank_pattern]\nx = 4").expect("a good configuration");
    let new = read_with(
        "[sample]\nprompts = [\"a\"]\npreview_vae = \"tiny\"",
        &[
            "train.steps=2000",
            "train.batch_size=2",
            "optimizer.learning_rate=5e-5",
            "optimizer.eps=1e-6",
            "lr_scheduler.name=cosine",
            "checkpoint.every=10",
            "lora.lora_alpha=32",
        ],
    )
    .expect("a good configuration");
    let changes = old.diff(&new).expect("TOML holds it");
    let lines: Vec<String> = changes
        .iter()
        .filter(|change| !change.key.starts_with("sample."))
        .map(|change| {
            format!(
                "{} {} -> {} {}",
                change.key, change.old, change.new, change.allowed
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            "checkpoint.every 100 -> 10 true",
            "lora.lora_alpha 16.0 -> 32.0 false",
            "lora.rank_pattern { x = 4 } -> unset false",
            "lr_scheduler.name \"constant\" -> \"cosine\" true",
            "optimizer.eps 0.00000001 -> 0.000001 false",
            "optimizer.learning_rate 0.0001 -> 0.00005 true",
            "train.batch_size 1 -> 2 false",
            "train.steps 1000 -> 2000 true",
        ]
    );
    let sample: Vec<&Change> = changes
        .iter()
        .filter(|change| change.key.starts_with("sample."))
        .collect();
    assert_eq!(sample.len(), fields_of::<SampleSection>().len());
    assert!(
        sample
            .iter()
            .all(|change| change.allowed && change.old == "unset")
    );
}

#[test]
fn what_was_called_train_recompute_is_still_read() {
    let recompute = |text: &str| read(text).expect("a good configuration").memory.recompute;
    assert_eq!(recompute("[train]\nrecompute = true"), Recompute::All);
    assert_eq!(recompute("[train]\nrecompute = false"), Recompute::First(0));
    assert_eq!(
        recompute("[memory]\nrecompute = \"none\""),
        Recompute::First(0)
    );
    assert_eq!(recompute("[memory]\nrecompute = 7"), Recompute::First(7));
    assert_eq!(recompute(""), Recompute::Auto);
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

#[test]
fn a_repository_of_the_hub_stays_a_name_unless_a_folder_is_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("run.toml");
    let text = "[model]\npath = \"owner/flux\"\n[dataset]\npath = \"owner/cats\"\n";
    fs::write(&file, text).expect("writable");
    let load = || RunConfig::load(&file, &[]).expect("a good configuration");
    assert_eq!(load().model.path, Path::new("owner/flux"));
    assert!(load().dataset.path.is_absolute());
    fs::create_dir_all(folder.path().join("owner/flux")).expect("writable");
    assert!(load().model.path.is_absolute());
}
