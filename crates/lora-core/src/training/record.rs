//! What a training run needs to go on, and the only order in which it can be restored.
//!
//! [`TrainingRecord`] `.restore_adapters(model)` `.restore_optimizer(..)` `.restore_progress()`: each step consumes the one
//! before. The optimizer cannot be restored before the adapters exist, and a [`Training`] that continues cannot be had
//! without all three.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use derive_new::new;

use crate::attach::{NewAdapter, attach};
use crate::error::LoraError;
use crate::peft::file::AdapterFile;
use crate::state::trainable_parameters;
use crate::training::gradients::Gradients;
use crate::training::optimizer::{OptimizerState, PathOptimizer};
use crate::training::optimizers::UpdateRule;

/// Everything that is saved: adapters, optimizer state, and the caller's own progress `P` (step, position ...).
///
/// `A` is an [`AdapterFile`], or several of a model that has parts. Not `Clone`: a record is used once.
#[must_use = "a record that is opened must be restored"]
#[derive(Debug, new)]
pub struct TrainingRecord<P, A = AdapterFile> {
    adapters: A,
    optimizer: OptimizerState,
    progress: P,
}

/// Adapters restored; the optimizer is still to come.
#[must_use = "the optimizer is still at zero"]
#[derive(Debug)]
pub struct AdaptersRestored<M, P> {
    model: M,
    optimizer: OptimizerState,
    progress: P,
}

/// Adapters and optimizer restored; the position is still to come.
#[must_use = "the position is still at zero"]
pub struct OptimizerRestored<M, P> {
    model: M,
    optimizer: PathOptimizer,
    progress: P,
}

/// A training run in memory: fresh, or at the end of the chain.
pub struct Training<M, P> {
    /// The model with its adapters.
    pub model: M,
    /// The optimizer with its state.
    pub optimizer: PathOptimizer,
    /// How far the run is.
    pub progress: P,
}

impl<M: Module, P> Training<M, P> {
    /// A run at its beginning, with any per-tensor optimizer of Burn or one of ours by name.
    pub fn new(model: M, optimizer: impl Into<UpdateRule>, progress: P) -> Self {
        Self {
            model,
            optimizer: PathOptimizer::new(optimizer),
            progress,
        }
    }

    /// One step against the gradient of `loss`, `[1]`, which was computed with this model. The progress is the caller's.
    ///
    /// # Errors
    /// As [`PathOptimizer::step`].
    pub fn step(&mut self, lr: f64, loss: &Tensor<1>) -> Result<(), LoraError> {
        let mut gradients = Gradients::default();
        gradients.take("", &self.model, &mut loss.backward());
        self.optimizer.step(lr, &mut self.model, gradients)
    }
}

impl<P> TrainingRecord<P> {
    /// Attaches the stored adapter to the bare model; `how` says under which name, on which path and what it must agree with,
    /// as `|file| file.stored().fast()` does.
    ///
    /// # Errors
    /// As [`attach`]: what is stored does not fit the model, or disagrees with the configuration.
    pub fn restore_adapters<M: Module>(
        self,
        model: M,
        how: impl FnOnce(AdapterFile) -> NewAdapter,
    ) -> Result<AdaptersRestored<M, P>, LoraError> {
        self.restore_by(|file| attach(model, how(file)))
    }
}

impl<P, A> TrainingRecord<P, A> {
    /// The same for a model of several parts, which `attached` is given the stored adapters for.
    ///
    /// # Errors
    /// What `attached` returns.
    pub fn restore_by<M: Module, E>(
        self,
        attached: impl FnOnce(A) -> Result<M, E>,
    ) -> Result<AdaptersRestored<M, P>, E> {
        Ok(AdaptersRestored {
            model: attached(self.adapters)?,
            optimizer: self.optimizer,
            progress: self.progress,
        })
    }
}

impl<M: Module, P> AdaptersRestored<M, P> {
    /// Gives `optimizer` the stored state of every trainable parameter; `device` is the one without autodiff.
    ///
    /// # Errors
    /// As [`PathOptimizer::restore`]: state and trainable parameters differ.
    pub fn restore_optimizer(
        self,
        optimizer: impl Into<UpdateRule>,
        device: &Device,
    ) -> Result<OptimizerRestored<M, P>, LoraError> {
        let optimizer = PathOptimizer::restore(
            optimizer,
            self.optimizer,
            &trainable_parameters(&self.model),
            device,
        )?;
        Ok(OptimizerRestored {
            model: self.model,
            optimizer,
            progress: self.progress,
        })
    }
}

impl<M, P> OptimizerRestored<M, P> {
    /// The run, where it stopped.
    pub fn restore_progress(self) -> Training<M, P> {
        Training {
            model: self.model,
            optimizer: self.optimizer,
            progress: self.progress,
        }
    }
}
