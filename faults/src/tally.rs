//! What came of the trials of one fault.

use anyhow::Result;

/// A trial that did what it had to; one that did not is an `Err`.
pub enum Trial {
    /// The injection did not fire, so nothing was tested.
    Missed,
    /// The promise held, and there is no end to compare.
    Survived,
    /// The run went on to its end; the first thing that differs from the straight run, if any.
    Ended(Option<&'static str>),
}

/// One row of the table.
#[derive(Default)]
pub struct Tally {
    /// Trials whose injection fired.
    pub trials: usize,
    survived: usize,
    compared: usize,
    identical: usize,
    missed: Vec<String>,
    /// What the numbers mean.
    pub note: String,
    failures: Vec<String>,
    failed: usize,
}

impl Tally {
    /// Counts a trial named `what`.
    pub fn count(&mut self, what: impl Into<String>, trial: Result<Trial>) {
        self.count_as(1, what, trial);
    }

    /// Counts a trial that `injections` went into.
    pub fn count_as(&mut self, injections: usize, what: impl Into<String>, trial: Result<Trial>) {
        match trial {
            Ok(Trial::Missed) => {
                self.missed.push(what.into());
                return;
            }
            Ok(Trial::Survived) => self.survived += injections,
            Ok(Trial::Ended(differs)) => {
                self.survived += injections;
                self.compared += injections;
                match differs {
                    None => self.identical += injections,
                    Some(what_differs) => {
                        self.fail(format!("{}: {what_differs} differs", what.into()))
                    }
                }
            }
            Err(error) => self.fail(format!("{}: {error:#}", what.into())),
        }
        self.trials += injections;
    }

    /// A failure that is no trial.
    pub fn fail(&mut self, what: String) {
        self.failed += 1;
        if self.failures.len() < 10 {
            self.failures.push(what);
        }
    }

    /// At least so many injections must have fired.
    pub fn expect(&mut self, trials: usize) {
        if self.trials < trials {
            let missed = self.missed.join(", ");
            self.fail(format!(
                "only {} of {trials} injections fired; missed: {missed}",
                self.trials
            ));
        }
    }

    /// Whether anything went wrong.
    pub fn failed(&self) -> bool {
        self.failed > 0
    }

    /// The failures, a line each.
    pub fn failures(&self) -> Vec<String> {
        let more = self.failed - self.failures.len();
        let more = (more > 0).then(|| format!("and {more} more"));
        self.failures.iter().cloned().chain(more).collect()
    }

    /// The columns of the table.
    pub fn row(&self, fault: &str) -> [String; 5] {
        let share = |part: usize, whole: usize| match whole {
            0 => "-".to_string(),
            _ => format!("{part}/{whole}"),
        };
        let trials = match self.trials {
            0 => "-".to_string(),
            n => n.to_string(),
        };
        [
            fault.to_string(),
            trials,
            share(self.survived, self.trials),
            share(self.identical, self.compared),
            self.note.clone(),
        ]
    }
}
