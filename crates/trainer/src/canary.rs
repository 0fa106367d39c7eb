//! Known faults, for checking that the fault suite finds them. Only with the cargo feature `canary`, which nothing that
//! ships has.
//!
//! The environment variable `FLUX_LORA_CANARY` picks one:
//!
//! | value | fault |
//! |---|---|
//! | `no-fsync` | the moments of a checkpoint are not fsynced |
//! | `no-folder-fsync` | the folder of a checkpoint is not fsynced before it gets its name |
//! | `no-name-fsync` | the run folder is not fsynced after a rename |
//! | `no-checksum` | the SHA-256 of the moments is not compared |
//! | `moment` | a resumed run has lost the first moment tensor |
//! | `random` | a resumed run counts its random numbers one micro-batch ahead |
//! | `cursor` | a resumed run is one micro-batch ahead in the data |
//! | `nan-loss:N`, `nan-gradient:N`, `nan-update:N` | NaN (infinity for even N) at step N |

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use lora_core::training::OptimizerState;

/// The faults of resuming show in resumed runs only: in every run, they would be no more than another run.
static RESUMED: AtomicBool = AtomicBool::new(false);

fn is(name: &str) -> bool {
    std::env::var("FLUX_LORA_CANARY").is_ok_and(|canary| canary == name)
}

fn moments(path: &Path) -> bool {
    path.ends_with("optimizer.safetensors")
}

/// Whether this fsync of a file is left out.
pub(crate) fn forgets_file(path: &Path) -> bool {
    is("no-fsync") && moments(path)
}

/// Whether this fsync of a folder is left out.
pub(crate) fn forgets_folder(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("ckpt-") {
        is("no-folder-fsync")
    } else {
        is("no-name-fsync")
    }
}

/// The SHA-256 that a file is found to have.
pub(crate) fn checked(path: &Path, found: String, expected: &str) -> String {
    if is("no-checksum") && moments(path) {
        expected.to_string()
    } else {
        found
    }
}

/// The stored moments that a run is resumed with.
pub(crate) fn resumed(mut moments: OptimizerState) -> OptimizerState {
    RESUMED.store(true, Ordering::SeqCst);
    if is("moment")
        && let Some(tensor) = moments.tensors.values_mut().next()
    {
        tensor.bytes.fill(0);
    }
    moments
}

/// The micro steps that random numbers and samples are drawn for.
pub(crate) fn steps(micro_step: u64) -> (u64, u64) {
    let ahead = |name| micro_step + u64::from(is(name) && RESUMED.load(Ordering::SeqCst));
    (ahead("random"), ahead("cursor"))
}

/// What to put in place of `place` (`loss`, `gradient`, `update`) in this step, if anything.
pub(crate) fn poison(place: &str, step: u64) -> Option<f64> {
    let value = if step.is_multiple_of(2) {
        f64::NEG_INFINITY
    } else {
        f64::NAN
    };
    is(&format!("nan-{place}:{step}")).then_some(value)
}
