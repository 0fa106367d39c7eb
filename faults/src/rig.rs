//! What every fault needs: a tiny run that was never stopped, copies of it as of any step, and the program to resume them.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::tally::Trial;

/// Steps of the run that is attacked.
pub const STEPS: u64 = 40;

/// A process that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Two sizes of pictures, batches of two, accumulation, dropout, warm-up, several epochs; a save every third step.
const CONFIG: &str = r#"
[dataset]
path = "data"
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
every = 3
keep = 2

[export]
formats = ["diffusers", "peft"]
"#;

/// A save after every step, and none deleted.
pub const EVERY_STEP: [&str; 4] = [
    "--set",
    "checkpoint.every=1",
    "--set",
    "checkpoint.keep=100",
];

/// What the suite was asked to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program under attack.
    pub program: PathBuf,
    /// The same built with the feature `canary`.
    pub canary_program: Option<PathBuf>,
    /// Cargo features with which the project's tests are built, for the one fault that is among them.
    pub test_features: Option<String>,
    /// Fewer trials.
    pub quick: bool,
    /// Of all random choices.
    pub seed: u64,
}

/// Data, configuration, the straight run and the program.
pub struct Rig {
    /// What the suite was asked to do.
    pub options: Options,
    canary: Option<String>,
    dir: TempDir,
    straight: Bits,
    random: RefCell<Random>,
    names: Cell<usize>,
}

impl Rig {
    /// Makes the data and trains the straight run; a save after every step, so that a copy can begin anywhere.
    pub fn new(options: &Options) -> Result<Self> {
        Self::with_canary(options, None)
    }

    /// The same around the canary program, which carries a known fault, or none.
    pub fn of_canary(options: &Options, canary: Option<&str>) -> Result<Self> {
        let program = options.canary_program.clone();
        let options = Options {
            program: program.context("no --canary-program")?,
            quick: true,
            ..options.clone()
        };
        Self::with_canary(&options, canary)
    }

    fn with_canary(options: &Options, canary: Option<&str>) -> Result<Self> {
        let program = fs::canonicalize(&options.program)
            .with_context(|| format!("open {}", options.program.display()))?;
        let mut rig = Self {
            random: RefCell::new(Random(options.seed)),
            options: Options {
                program,
                ..options.clone()
            },
            canary: canary.map(str::to_string),
            dir: tempfile::tempdir()?,
            straight: Bits::default(),
            names: Cell::new(0),
        };
        make_data(&rig.path("data"))?;
        let head = format!("[model]\npath = \"{}\"\n", model().display());
        fs::write(rig.path("run.toml"), head + CONFIG)?;
        let straight = rig.path("straight");
        rig.run(rig.train(&straight, &EVERY_STEP))?.ok()?;
        rig.straight = Bits::of(&straight)?;
        let logged = lines(&straight);
        ensure!(
            logged as u64 == STEPS,
            "the straight run logged {logged} lines"
        );
        Ok(rig)
    }

    /// A path in the folder that goes away with the rig.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path that nothing has yet.
    pub fn fresh(&self, what: &str) -> PathBuf {
        self.names.set(self.names.get() + 1);
        self.path(&format!("{what}-{}", self.names.get()))
    }

    /// The program under attack.
    pub fn program(&self) -> &Path {
        &self.options.program
    }

    /// `few` trials in the quick suite, `all` in the full one.
    pub fn count(&self, few: usize, all: usize) -> usize {
        if self.options.quick { few } else { all }
    }

    /// A seeded random number below `n`.
    pub fn below(&self, n: u64) -> u64 {
        self.random.borrow_mut().next() % n.max(1)
    }

    /// At most `count` of `items`, chosen at random, in their order.
    pub fn sample<T: Clone>(&self, items: &[T], count: usize) -> Vec<T> {
        let mut chosen: Vec<(u64, usize)> = (0..items.len())
            .map(|index| (self.below(u64::MAX), index))
            .collect();
        chosen.sort_unstable();
        chosen.truncate(count);
        chosen.sort_unstable_by_key(|(_, index)| *index);
        chosen.into_iter().map(|(_, i)| items[i].clone()).collect()
    }

    /// Sets the canary that a program built for it is to carry.
    pub fn dress(&self, command: &mut Command) {
        command.env_remove("FLUX_LORA_CANARY");
        if let Some(canary) = &self.canary {
            command.env("FLUX_LORA_CANARY", canary);
        }
    }

    /// `flux-lora train run.toml --output RUN ARGS`.
    pub fn train(&self, run: &Path, args: &[&str]) -> Command {
        self.train_with(self.program(), run, args)
    }

    /// The same with another program, such as one that wraps it.
    pub fn train_with(&self, program: &Path, run: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("train").arg(self.path("run.toml"));
        command.arg("--output").arg(run).args(args);
        self.dress(&mut command);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, command: Command) -> Result<Ended> {
        Process::start(command)?.wait()
    }

    /// A copy of the straight run as it was when the newest of `steps` had been saved, with those checkpoints.
    pub fn run_at(&self, steps: &[u64]) -> Result<PathBuf> {
        let (from, to) = (self.path("straight"), self.fresh("run"));
        let names: Vec<String> = steps.iter().map(|step| checkpoint(*step)).collect();
        copy(&from, &to, &|name| {
            name == "cache" || names.iter().any(|n| n == name)
        })?;
        fs::write(to.join("run.lock"), "1\n")?;
        if let Some(newest) = names.last() {
            let manifest = fs::read(to.join(newest).join("MANIFEST.json"))?;
            fs::write(
                to.join("LATEST"),
                format!("{newest}\n{}\n", sha256(&manifest)),
            )?;
        }
        // The log of a run that was killed is a step ahead of the checkpoint, and in the middle of a line.
        let log = fs::read_to_string(from.join("metrics.jsonl"))?;
        let mut ahead: String = log
            .split_inclusive('\n')
            .take(steps.last().map_or(0, |step| *step as usize + 1))
            .collect();
        ahead += "{\"step\":";
        fs::write(to.join("metrics.jsonl"), ahead)?;
        Ok(to)
    }

    /// A copy with three steps to go, and two checkpoints.
    pub fn run_near_end(&self) -> Result<PathBuf> {
        self.run_at(&[STEPS - 4, STEPS - 3])
    }

    /// Resumes a run to its end and compares what it ends in; removes it.
    pub fn finish(&self, run: &Path) -> Result<Trial> {
        self.finish_with(run, &[])
    }

    /// The same with more arguments.
    pub fn finish_with(&self, run: &Path, args: &[&str]) -> Result<Trial> {
        let args = [&["--resume"], args].concat();
        self.run(self.train(run, &args))?.ok()?;
        self.compare(run)
    }

    /// Compares a finished run with the straight one; removes it.
    pub fn compare(&self, run: &Path) -> Result<Trial> {
        self.compare_with(run, &self.straight)
    }

    /// Compares a finished run with another; removes it.
    pub fn compare_with(&self, run: &Path, expected: &Bits) -> Result<Trial> {
        let differs = Bits::of(run)?.differs_from(expected);
        for folder in [run, &run.join("lora-peft")] {
            for entry in fs::read_dir(folder)? {
                let name = entry?.file_name();
                let name = name.to_string_lossy();
                ensure!(!name.contains(".tmp"), "{name} is left in the finished run");
            }
        }
        fs::remove_dir_all(run)?;
        Ok(Trial::Ended(differs))
    }

    /// The step of the newest checkpoint, from `inspect`, which verifies every one.
    pub fn newest_step(&self, run: &Path) -> Result<Option<u64>> {
        if checkpoints(run)?.is_empty() {
            return Ok(None);
        }
        let text = self.inspect(run)?.ok()?.out;
        ensure!(!text.contains("NOT VALID"), "{text}");
        let step = text
            .lines()
            .find_map(|line| line.strip_prefix("step:")?.split_whitespace().next());
        let step = step.with_context(|| format!("inspect names no step: {text}"))?;
        Ok(Some(step.parse()?))
    }

    /// `flux-lora inspect PATH`.
    pub fn inspect(&self, path: &Path) -> Result<Ended> {
        let mut command = Command::new(self.program());
        command.arg("inspect").arg(path);
        self.dress(&mut command);
        let out = command.output()?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended {
            status: out.status,
            out: text(&out.stdout),
            err: text(&out.stderr),
        })
    }
}

/// A process that is ended with the value, and what it said.
pub struct Process {
    child: Child,
    out: File,
    err: File,
}

/// How a process ended.
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Process {
    pub fn start(mut command: Command) -> Result<Self> {
        let (out, err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        command.stdin(Stdio::null());
        command.stdout(out.try_clone()?).stderr(err.try_clone()?);
        let child = command
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self { child, out, err })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGKILL; false if it had ended before.
    pub fn kill(&mut self) -> Result<bool> {
        use std::os::unix::process::ExitStatusExt;
        self.child.kill()?;
        Ok(self.child.wait()?.signal() == Some(9))
    }

    /// Waits until `condition`; false if the process ends before.
    pub fn wait_until(&mut self, mut condition: impl FnMut() -> bool) -> Result<bool> {
        let started = Instant::now();
        while self.is_running()? {
            if condition() {
                return Ok(true);
            }
            ensure!(started.elapsed() < PATIENCE, "the process hangs");
            sleep(Duration::from_micros(200));
        }
        Ok(false)
    }

    pub fn wait(mut self) -> Result<Ended> {
        self.wait_until(|| false)?;
        let status = self.child.wait()?;
        Ok(Ended {
            status,
            out: read(&mut self.out)?,
            err: read(&mut self.err)?,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails where the process has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// An error unless the exit code is 0.
    pub fn ok(self) -> Result<Self> {
        let Self { status, err, .. } = &self;
        ensure!(status.success(), "{status}: {}", last_line(err));
        Ok(self)
    }

    /// The one line of an error, after checking the exit code; it must contain all of `parts`.
    pub fn refused(&self, parts: &[&str]) -> Result<String> {
        let Self { status, err, .. } = self;
        let lines: Vec<&str> = err.lines().filter(|l| l.starts_with("error: ")).collect();
        let [line] = lines[..] else {
            bail!("{status}, and not one line of error: {}", last_line(err));
        };
        ensure!(status.code() == Some(1), "{status}: {line}");
        ensure!(!err.contains("panicked"), "panicked: {err}");
        for part in parts {
            ensure!(line.contains(part), "`{part}` is not in: {line}");
        }
        Ok(line.to_string())
    }
}

/// The bits a run ends in.
#[derive(Default)]
pub struct Bits {
    lora: Vec<u8>,
    checkpoint_lora: Vec<u8>,
    optimizer: Vec<u8>,
    metrics: Vec<u8>,
    peft: Vec<u8>,
}

impl Bits {
    /// Of a finished run.
    pub fn of(run: &Path) -> Result<Self> {
        let last = checkpoints(run)?
            .pop()
            .context("the run has no checkpoint")?;
        let last = run.join(last);
        let read = |path: PathBuf| {
            fs::read(&path).with_context(|| format!("the run has no {}", path.display()))
        };
        Ok(Self {
            lora: read(run.join("lora.safetensors"))?,
            checkpoint_lora: read(last.join("lora.safetensors"))?,
            optimizer: read(last.join("optimizer.safetensors"))?,
            metrics: read(run.join("metrics.jsonl"))?,
            peft: read(run.join("lora-peft/adapter_model.safetensors"))?,
        })
    }

    fn differs_from(&self, other: &Self) -> Option<&'static str> {
        [
            ("metrics.jsonl", self.metrics == other.metrics),
            ("optimizer.safetensors", self.optimizer == other.optimizer),
            ("the adapter", self.checkpoint_lora == other.checkpoint_lora),
            ("lora.safetensors", self.lora == other.lora),
            ("lora-peft", self.peft == other.peft),
        ]
        .into_iter()
        .find_map(|(name, same)| (!same).then_some(name))
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The tiny pipeline of the reference cases.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/pipeline_dev/model")
}

fn make_data(data: &Path) -> Result<()> {
    fs::create_dir(data)?;
    let sizes = [(80, 80), (72, 96), (96, 96), (64, 100), (80, 80)];
    for (i, (width, height)) in sizes.into_iter().enumerate() {
        picture(width, height, i as u32).save(data.join(format!("{i}.png")))?;
        fs::write(
            data.join(format!("{i}.txt")),
            format!("a photo of pattern {i}"),
        )?;
    }
    Ok(())
}

/// A pattern of waves.
pub fn picture(width: u32, height: u32, i: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let wave = |k: u32| ((x * (k + 3) + y * (2 * k + 1) + 17 * i) % 256) as u8;
        image::Rgb([wave(1), wave(2), wave(i)])
    })
}

/// Folder name of the checkpoint of a step.
pub fn checkpoint(step: u64) -> String {
    format!("ckpt-{step:010}")
}

/// Names of the checkpoints of a run, oldest first.
pub fn checkpoints(run: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(run)? {
        names.extend(entry?.file_name().into_string());
    }
    names.retain(|name| name.starts_with("ckpt-") && !name.contains('.'));
    names.sort();
    Ok(names)
}

/// Complete lines of the metrics log.
pub fn lines(run: &Path) -> usize {
    let text = fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// Copies a folder; `keep` decides on the names at its top.
pub fn copy(from: &Path, to: &Path, keep: &dyn Fn(&str) -> bool) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (path, name) = {
            let entry = entry?;
            (entry.path(), entry.file_name())
        };
        let target = to.join(&name);
        if !keep(&name.to_string_lossy()) {
        } else if path.is_dir() {
            copy(&path, &target, &|_| true)?;
        } else {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

/// Digest of the names and contents of a run folder, cache included.
pub fn digest(folder: &Path) -> Result<String> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    entries.sort();
    let mut all = String::new();
    for path in entries {
        let content = match path.is_dir() {
            true => digest(&path)?,
            false => sha256(&fs::read(&path)?),
        };
        all += &format!("{} {content}\n", path.display());
    }
    Ok(sha256(all.as_bytes()))
}

/// Lower-case hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a program of this name is installed.
pub fn installed(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join(name).is_file())
}

fn read(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or("no message")
}
