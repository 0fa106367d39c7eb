//! A suite that cannot fail proves nothing: a program with a known fault must make the fault's trials fail.
//!
//! `--canary-program` is flux-lora built with the feature `canary`; `FLUX_LORA_CANARY` picks the fault.

use anyhow::{Context, Result, ensure};

use crate::rig::Rig;
use crate::tally::{Tally, Trial};
use crate::{FAULTS, Fault};

/// What is wrong with the program, and where that has to show.
const CANARIES: [(&str, &str); 7] = [
    ("no-fsync", "sync-order"),
    ("no-folder-fsync", "sync-order"),
    ("no-name-fsync", "sync-order"),
    ("no-checksum", "bit-flip"),
    ("moment", "fallback"),
    ("random", "fallback"),
    ("cursor", "fallback"),
];

/// Each canary, and first none: the same program without a fault must pass.
pub fn run(rig: &Rig, tally: &mut Tally) -> Result<()> {
    if rig.options.canary_program.is_none() {
        tally.note = "skipped: no --canary-program".into();
        return Ok(());
    }
    let mut faults: Vec<&str> = CANARIES.iter().map(|(_, fault)| *fault).collect();
    faults.sort_unstable();
    faults.dedup();
    let controls = faults.iter().map(|fault| (None, *fault));
    let canaries = CANARIES
        .iter()
        .map(|(canary, fault)| (Some(*canary), *fault));
    for (canary, name) in controls.chain(canaries) {
        let what = format!("{} under {name}", canary.unwrap_or("no canary"));
        let trial = attack(rig, canary, name);
        let trial = trial.and_then(|found| {
            if let (Some(canary), Some(reason)) = (canary, found.failures().first()) {
                eprintln!("  {canary} was noticed: {reason}");
            }
            ensure!(
                found.failed() == canary.is_some(),
                "{}",
                match canary {
                    Some(_) => "was not noticed".to_string(),
                    None => found.failures().join("; "),
                }
            );
            Ok(Trial::Survived)
        });
        tally.count(what, trial);
    }
    tally.expect(CANARIES.len() + faults.len());
    tally.note = format!(
        "{} canaries noticed; {} controls without one pass",
        CANARIES.len(),
        faults.len()
    );
    Ok(())
}

fn attack(rig: &Rig, canary: Option<&str>, name: &str) -> Result<Tally> {
    let rig = Rig::of_canary(&rig.options, canary)?;
    let fault: Option<Fault> = FAULTS.into_iter().find(|(known, _)| *known == name);
    let (_, fault) = fault.context("no such fault")?;
    let mut found = Tally::default();
    fault(&rig, &mut found)?;
    ensure!(found.trials > 0, "nothing was tried");
    Ok(found)
}
