//! What a block computes once, though it is run twice: for what it gives, and again for its gradients.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;

thread_local!(static RUN: RefCell<Run> = const { RefCell::new(Run::Only) });

/// How the block that this thread computes is run.
pub(crate) enum Run {
    /// As any code is, or nothing is kept of it.
    Only,
    /// For the first time, and its results are kept.
    First(Results),
    /// For its gradients alone: nobody reads what it returns.
    Second(Results),
}

/// What the calls of [`computed_once`] in a block made, in their order; none where it is not kept.
pub(crate) type Results = VecDeque<Option<Box<dyn Any>>>;

/// Whether a block runs a second time, for its gradients alone: nobody reads what it returns.
#[cfg(feature = "flex")]
pub(crate) fn is_second_run() -> bool {
    RUN.with_borrow(|run| matches!(run, Run::Second(_)))
}

/// What `compute` makes. Where a chain keeps the results of a block, those of its first run that are to be kept are what its
/// second run gets.
///
/// A block calls this as often in both runs, in the same order.
pub fn computed_once<T: Clone + 'static>(is_kept: bool, compute: impl FnOnce() -> T) -> T {
    let kept = RUN.with_borrow_mut(|run| match run {
        Run::Second(results) => results.pop_front().flatten(),
        Run::Only | Run::First(_) => None,
    });
    if let Some(kept) = kept {
        let kept = kept.downcast().ok();
        return *kept.expect("a block computes the same in both runs");
    }
    let made = compute();
    RUN.with_borrow_mut(|run| {
        if let Run::First(results) = run {
            results.push_back(is_kept.then(|| Box::new(made.clone()) as Box<dyn Any>));
        }
    });
    made
}

/// The way a block is run, until it is dropped.
pub(crate) struct Running;

impl Running {
    pub(crate) fn begin(run: Run) -> Self {
        RUN.set(run);
        Self
    }

    /// What was kept.
    pub(crate) fn end(self) -> Results {
        match RUN.replace(Run::Only) {
            Run::First(results) => results,
            Run::Only | Run::Second(_) => Results::new(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUN.set(Run::Only);
    }
}
