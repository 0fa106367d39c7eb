//! What the whole-program tests share: a tiny run to train, the program to train it with, and comparisons.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use lora_core::files::safetensors::TensorFile;
use tempfile::TempDir;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the repository")
        .to_path_buf()
}

/// The program, built by `cargo xtask test` beside the test binary.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test
        .parent()
        .and_then(Path::parent)
        .expect("target/<profile>/deps/it");
    let program = folder.join("flux-lora");
    assert!(
        program.is_file(),
        "{} is not built: run the tests with `cargo xtask test`",
        program.display()
    );
    program
}

/// A folder with data, configuration and runs that goes away with the value.
pub struct Workbench {
    /// The folder.
    pub dir: TempDir,
}

/// Five small pictures of two shapes, batches of two, accumulation, dropout, warm-up, several epochs.
pub const CONFIG: &str = r#"
[dataset]
resolution = 64
bucket_step = 16
caption_dropout = 0.2
random_flip = true
max_sequence_length = 16

[lora]
r = 4
lora_alpha = 7
lora_dropout = 0.1

[optimizer]
learning_rate = 2e-3

[lr_scheduler]
name = "cosine"
warmup_steps = 5

[train]
steps = 40
batch_size = 2
gradient_accumulation_steps = 2
seed = 7
timestep_sampling = "logit_normal"
shift = 1.5

[checkpoint]
every = 1
keep = 100
"#;

impl Workbench {
    /// A fresh workbench with [`CONFIG`] and `extra` lines appended.
    pub fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().expect("temporary folder"),
        };
        let data = bench.path("data");
        fs::create_dir(&data).expect("create data folder");
        for (i, (width, height)) in [(80, 80), (72, 96), (96, 96), (64, 100), (80, 80)]
            .into_iter()
            .enumerate()
        {
            let image = image::RgbImage::from_fn(width, height, |x, y| {
                let wave = |k: u32| ((x * (k + 3) + y * (2 * k + 1) + 17 * i as u32) % 256) as u8;
                image::Rgb([wave(1), wave(2), wave(i as u32)])
            });
            image
                .save(data.join(format!("{i}.png")))
                .expect("write image");
            fs::write(
                data.join(format!("{i}.txt")),
                format!("a photo of pattern {i}"),
            )
            .expect("write caption");
        }
        bench.write_config(CONFIG);
        bench
    }

    /// A path inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `run.toml`: where model and data are, and `rest`.
    pub fn write_config(&self, rest: &str) {
        let model = root().join("tests/fixtures/parity/pipeline_dev/model");
        let head = format!("[model]\npath = \"{}\"\n", model.display());
        let rest = rest.replacen("[dataset]", "[dataset]\npath = \"data\"", 1);
        fs::write(self.path("run.toml"), head + &rest).expect("write run.toml");
    }

    /// `flux-lora train run.toml --output OUT ARGS`, not yet started.
    pub fn train_command(&self, output: &str, device: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .arg("train")
            .arg(self.path("run.toml"))
            .arg("--output")
            .arg(self.path(output));
        command
            .env("XDG_CACHE_HOME", self.path("user-cache"))
            .args(["--device", device])
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs it to its end.
    pub fn train(&self, output: &str, device: &str, args: &[&str]) -> Output {
        self.train_command(output, device, args)
            .output()
            .expect("start flux-lora")
    }

    /// Runs it and expects success.
    pub fn train_ok(&self, output: &str, device: &str, args: &[&str]) {
        let out = self.train(output, device, args);
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    /// Starts it in the background, quietly.
    pub fn train_in_background(&self, output: &str, device: &str, args: &[&str]) -> Child {
        self.train_command(output, device, args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start flux-lora")
    }

    /// What a run ends in: adapter, moments, losses.
    pub fn result(&self, output: &str) -> RunResult {
        let run = self.path(output);
        let last = run.join(last_checkpoint(&run));
        let read = |path: PathBuf| {
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        RunResult {
            lora: read(run.join("lora.safetensors")),
            checkpoint_lora: read(last.join("lora.safetensors")),
            optimizer: read(last.join("optimizer.safetensors")),
            metrics: String::from_utf8(read(run.join("metrics.jsonl"))).expect("metrics are text"),
        }
    }

    /// Copies a run folder without its cache and lock.
    pub fn copy_run(&self, from: &str, to: &str, keep: impl Fn(&str) -> bool) {
        copy(&self.path(from), &self.path(to), &|name| keep(name));
    }
}

impl Default for Workbench {
    fn default() -> Self {
        Self::new()
    }
}

/// The bits a run ends in.
#[derive(PartialEq, Eq)]
pub struct RunResult {
    /// The finished LoRA.
    pub lora: Vec<u8>,
    /// The last checkpoint's adapter.
    pub checkpoint_lora: Vec<u8>,
    /// The last checkpoint's moments.
    pub optimizer: Vec<u8>,
    /// One line a step.
    pub metrics: String,
}

impl RunResult {
    /// Panics with what differs.
    pub fn assert_same(&self, other: &Self, what: &str) {
        assert!(
            self.metrics == other.metrics,
            "{what}: metrics differ\n{}\n{}",
            self.metrics,
            other.metrics
        );
        assert!(self.optimizer == other.optimizer, "{what}: moments differ");
        assert!(
            self.checkpoint_lora == other.checkpoint_lora,
            "{what}: adapters differ"
        );
        assert!(self.lora == other.lora, "{what}: finished LoRAs differ");
    }
}

/// Name of the newest checkpoint folder of a run.
pub fn last_checkpoint(run: &Path) -> String {
    checkpoints(run)
        .pop()
        .unwrap_or_else(|| panic!("{} holds no checkpoint", run.display()))
}

/// Names of the checkpoint folders of a run, oldest first.
pub fn checkpoints(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(run)
        .map(|entries| {
            entries
                .filter_map(|e| e.ok()?.file_name().into_string().ok())
                .collect()
        })
        .unwrap_or_default();
    names.retain(|name| name.starts_with("ckpt-") && !name.contains('.'));
    names.sort();
    names
}

/// Copies a folder; `keep` decides on the names at its top.
pub fn copy(from: &Path, to: &Path, keep: &dyn Fn(&str) -> bool) {
    fs::create_dir_all(to).expect("create folder");
    for entry in fs::read_dir(from).expect("read folder") {
        let entry = entry.expect("read folder");
        let name = entry
            .file_name()
            .into_string()
            .expect("names here are text");
        if !keep(&name) {
            continue;
        }
        if entry.path().is_dir() {
            copy(&entry.path(), &to.join(&name), &|_| true);
        } else {
            fs::copy(entry.path(), to.join(&name)).expect("copy file");
        }
    }
}

/// The tensors of a file, in f32, by name.
pub fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = TensorFile::open(path).expect("a safetensors file");
    let read = |name: &str| {
        (
            name.to_string(),
            file.read(name).expect("named there").to_f32(),
        )
    };
    file.names().map(read).collect()
}
