//! Micro-batches read by a thread while the ones before are computed.
//!
//! What a micro-batch is depends on its micro step alone, so who reads it, and when, changes no bit. Read is what is on the host; the thread of
//! the run brings it to the device, in order.

use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

use anyhow::{Context, ensure};
use burn::tensor::Device;
use flux_model::family::Family;
use flux_model::prompted::PromptedInput;

use crate::config::RunConfig;
use crate::data::batch::{Data, Read};
use crate::step::Drawn;

/// Micro-batches in their order.
pub struct Ahead<'a, F: Family> {
    data: &'a Data<'a, F>,
    config: &'a RunConfig,
    read: Receiver<(u64, anyhow::Result<Read<F>>)>,
}

impl<'a, F: Family> Ahead<'a, F> {
    /// Begins to read those of `micro_steps`, `count` of them ahead of who asks. The thread ends with the last of them, at an error, or when this
    /// is dropped.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        data: &'a Data<'a, F>,
        config: &'a RunConfig,
        micro_steps: Range<u64>,
        count: usize,
    ) -> io::Result<Self>
    where
        'a: 'scope,
    {
        // One more than the channel holds is ready, in the hands of the thread.
        let (send, read) = sync_channel(count.saturating_sub(1));
        Builder::new()
            .name("data".into())
            .spawn_scoped(scope, move || {
                for micro_step in micro_steps {
                    let found = data.read(config, micro_step);
                    let is_last = found.is_err();
                    if send.send((micro_step, found)).is_err() || is_last {
                        return;
                    }
                }
            })?;
        Ok(Self { data, config, read })
    }

    /// The micro-batch of `micro_step`, which must be the next one, on `device`.
    ///
    /// # Errors
    /// A cache entry that has vanished.
    pub fn draw(
        &self,
        micro_step: u64,
        device: &Device,
    ) -> anyhow::Result<Drawn<PromptedInput<F>>> {
        let (found, read) = (self.read.recv()).context("the thread that reads data has ended")?;
        ensure!(
            found == micro_step,
            "micro-batch {found} was read where {micro_step} was asked for"
        );
        self.data.place(self.config, read?, device)
    }
}
