//! Blocks of a network that are read when they are needed and dropped when they are done.
//!
//! The network in memory has everything that is not in a block, and in place of the blocks' parameters *placeholders*: of
//! their shapes, without memory of their own, and not a number, so that nothing can be computed with one unnoticed. Adapters
//! sit on placeholders as on any parameter. A block is a copy of its part of the network, adapters included, with the
//! values from the checkpoint in their places; they are those that a resident network has, bit for bit.
//!
//! While one block computes, a thread reads the next. Which one that is depends on what walks over the network (a forward
//! pass, a backward pass after it), so it is what came next the last time. Weights that are computed with as they are stored take
//! no memory but the system's cache of the file, which is mapped; the thread brings them into it, and looks at every value.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use lora_core::files::quantised::{Codec, Quantised};
use lora_core::frozen::hold;

use super::checkpoint::Checkpoint;
use super::find::Parameter;
use super::storage::{BaseDtype, Held, Ready};
use crate::error::WeightsError;

/// The blocks of one network on disk; a copy is the same stream.
#[derive(Clone)]
pub struct Stream(Arc<Shared>);

struct Shared {
    checkpoint: Checkpoint,
    base: BaseDtype,
    device: Device,
    /// Paths in the network, and the parameters there.
    blocks: Vec<(String, Vec<Parameter>)>,
    ahead: Mutex<Ahead>,
}

/// The values of a block, by the paths of its parameters.
type Values = BTreeMap<String, Ready>;

/// What was asked for, and what is read before it is asked for.
#[derive(Default)]
struct Ahead {
    /// The last two.
    asked: [Option<usize>; 2],
    /// What was asked for after two others, the last time.
    followers: BTreeMap<[Option<usize>; 2], usize>,
    reading: Option<(usize, JoinHandle<Result<Values, WeightsError>>)>,
}

impl Ahead {
    /// Notes what is asked for, and says what will be next.
    fn next(&mut self, index: usize, count: usize) -> Option<usize> {
        self.followers.insert(self.asked, index);
        self.asked = [self.asked[1], Some(index)];
        let further = match self.asked[0] {
            Some(before) if before > index => index.checked_sub(1),
            _ => Some(index + 1).filter(|next| *next < count),
        };
        self.followers.get(&self.asked).copied().or(further)
    }
}

impl Stream {
    pub(super) fn new(
        checkpoint: Checkpoint,
        base: BaseDtype,
        device: &Device,
        blocks: Vec<(String, Vec<Parameter>)>,
    ) -> Self {
        Self(Arc::new(Shared {
            checkpoint,
            base,
            device: device.clone().inner(),
            blocks,
            ahead: Mutex::default(),
        }))
    }

    /// The checkpoint.
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.0.checkpoint
    }

    /// Block `index` of the network, `block`, with its values.
    ///
    /// # Errors
    /// A file that has changed since it was opened, a value that is not finite.
    pub(crate) fn fill<B: Module>(&self, index: usize, block: B) -> Result<B, WeightsError> {
        let mut fill = Fill {
            values: self.take(index)?,
            held: Held::new(),
            path: Vec::new(),
        };
        let block = block.map(&mut fill);
        Ok(hold(block, fill.held).expect("they are of the block's shapes"))
    }

    /// One row of the only parameter of block `index`, a matrix, as f32.
    ///
    /// # Errors
    /// No such row, or a value that is not finite.
    pub(crate) fn row(&self, index: usize, row: usize) -> Result<Vec<f32>, WeightsError> {
        let matrix = &self.0.blocks[index].1[0].place.location.key;
        self.checkpoint().row(matrix, row)
    }

    pub(super) fn count(&self) -> usize {
        self.0.blocks.len()
    }

    /// Every weight that is brought into few bits, by its path in the network, with how.
    pub(super) fn codecs(&self) -> impl Iterator<Item = (&Parameter, Codec)> {
        let shared = &self.0;
        let parameters = shared.blocks.iter().flat_map(|(_, parameters)| parameters);
        parameters.filter_map(|parameter| {
            let codec = (shared.checkpoint).codec(parameter, shared.base, &shared.device)?;
            Some((parameter, codec))
        })
    }

    /// The weights of block `index` that are in few bits, by their paths in the network.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    pub(super) fn few_bits(
        &self,
        index: usize,
    ) -> Result<BTreeMap<String, Arc<Quantised>>, WeightsError> {
        let block = &self.0.blocks[index].0;
        let values = self.0.read(index)?.into_iter();
        let weights = values.filter_map(|(path, ready)| match ready {
            Ready::FewBits(weight) => Some((format!("{block}.{path}"), weight)),
            Ready::Dense { .. } => None,
        });
        Ok(weights.collect())
    }

    fn take(&self, index: usize) -> Result<Values, WeightsError> {
        let mut ahead = self.0.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let read = ahead.reading.take().and_then(|(read, thread)| {
            let values = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            (read == index).then_some(values)
        });
        let values = match read {
            Some(values) => values?,
            None => self.0.read(index)?,
        };
        let next = ahead.next(index, self.0.blocks.len());
        if let Some(next) = next {
            let shared = self.0.clone();
            let thread = thread::Builder::new().name("weights".into());
            // Without a thread it is read when it is asked for.
            let thread = thread.spawn(move || shared.read(next)).ok();
            ahead.reading = thread.map(|thread| (next, thread));
        }
        Ok(values)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.checkpoint().path().display())
    }
}

impl Shared {
    fn read(&self, index: usize) -> Result<Values, WeightsError> {
        let (block, parameters) = &self.blocks[index];
        let ready = |parameter: &Parameter| {
            let path = parameter.within(block).unwrap_or_default().to_string();
            let ready =
                (self.checkpoint).ready_where_it_lies(parameter, self.base, &self.device)?;
            Ok((path, ready))
        };
        parameters.iter().map(ready).collect()
    }
}

/// Puts values in the places of placeholders.
struct Fill {
    values: Values,
    held: Held,
    path: Vec<String>,
}

impl ModuleMapper for Fill {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        match self.values.remove(&path) {
            Some(values) => {
                let values = values.on(path, &mut self.held, &param.lazy_device());
                Param::initialized(param.id, values)
            }
            None => param,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_next_is_what_came_next_before() {
        let mut ahead = Ahead::default();
        let mut walk = |blocks: &[usize]| -> Vec<Option<usize>> {
            blocks.iter().map(|&block| ahead.next(block, 3)).collect()
        };
        let step = [0, 1, 2, 2, 1, 0];
        assert_eq!(
            walk(&step),
            [Some(1), Some(2), None, None, Some(0), None],
            "in the direction of travel, and at its end nobody knows"
        );
        walk(&step);
        let next = [1, 2, 2, 1, 0, 0].map(Some);
        assert_eq!(walk(&step), next, "a step like the one before");
    }
}
