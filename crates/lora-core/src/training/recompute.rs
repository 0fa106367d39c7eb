//! Per-block recompute: gradients of a chain of blocks, keeping only each block's input.
//!
//! The forward pass runs without a graph; the backward pass takes the blocks in reverse, runs each again under autodiff
//! with its kept input as a leaf, and feeds in the gradient that came from behind (Chen et al. 2016, arXiv:1604.06174).
//! The gradients have the same bits as those of plain autodiff, provided that the untracked forward runs on the autodiff
//! device (other kernels may be picked on the plain one) and that every block uses each shared input through one node.
//!
//! What a block adds last is not computed the second time where the block says so ([`last_linear`](crate::last_linear)): its
//! value is read by the blocks behind, which had it the first time, and by no gradient. What takes much work beside its size,
//! the results of linear layers and of attention, can be kept from the first run for the second ([`computed_once`](crate::ops::computed_once)).

use burn::module::Module;
use burn::tensor::{Gradients as BurnGradients, Tensor};

use crate::ops::once::{Results, Run, Running};
use crate::training::gradients::Gradients;

/// A tensor, a tuple or a list of them, or a type of your own made of them, that flows between blocks.
///
/// A part that is a constant of the step, such as a position table, is lifted by `lift` and by `leaf` alike and keeps out of
/// the others: it gets no gradient.
pub trait TensorTree: Clone {
    /// On the autodiff device, not tracked.
    fn lift(self) -> Self;
    /// On the autodiff device, a fresh leaf that requires a gradient.
    fn leaf(self) -> Self;
    /// Off the autodiff device.
    fn inner(self) -> Self;
    /// Sum of the products with `gradient`; its backward pass seeds `self` with `gradient`.
    fn dot(self, gradient: Self) -> Option<Tensor<1>>;
    /// Moves this leaf's gradient out, zero where none arrived.
    fn take_gradient(&self, from: &mut BurnGradients) -> Self;
    /// Element-wise sum.
    fn plus(self, other: Self) -> Self;
}

impl<const D: usize> TensorTree for Tensor<D> {
    fn lift(self) -> Self {
        self.autodiff()
    }
    fn leaf(self) -> Self {
        self.autodiff().require_grad()
    }
    fn inner(self) -> Self {
        Tensor::inner(self)
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        Some((self * gradient).sum())
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        self.grad_remove(from)
            .unwrap_or_else(|| self.clone().inner().zeros_like())
    }
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl<A: TensorTree, B: TensorTree> TensorTree for (A, B) {
    fn lift(self) -> Self {
        (self.0.lift(), self.1.lift())
    }
    fn leaf(self) -> Self {
        (self.0.leaf(), self.1.leaf())
    }
    fn inner(self) -> Self {
        (self.0.inner(), self.1.inner())
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        match (self.0.dot(gradient.0), self.1.dot(gradient.1)) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        }
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        (self.0.take_gradient(from), self.1.take_gradient(from))
    }
    fn plus(self, other: Self) -> Self {
        (self.0.plus(other.0), self.1.plus(other.1))
    }
}

impl<T: TensorTree> TensorTree for Vec<T> {
    fn lift(self) -> Self {
        self.into_iter().map(T::lift).collect()
    }
    fn leaf(self) -> Self {
        self.into_iter().map(T::leaf).collect()
    }
    fn inner(self) -> Self {
        self.into_iter().map(T::inner).collect()
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        let products = self.into_iter().zip(gradient);
        products
            .filter_map(|(part, gradient)| part.dot(gradient))
            .reduce(|a, b| a + b)
    }
    fn take_gradient(&self, from: &mut BurnGradients) -> Self {
        self.iter().map(|part| part.take_gradient(from)).collect()
    }
    fn plus(self, other: Self) -> Self {
        let pairs = self.into_iter().zip(other);
        pairs.map(|(a, b)| a.plus(b)).collect()
    }
}

/// A network whose depth is a chain of blocks.
pub trait Blocks {
    /// One block. Blocks of several kinds are one type that passes visitors on, without a path of its own.
    type Block: Module;
    /// What flows from block to block.
    type Carry: TensorTree;
    /// What every block reads besides.
    type Shared: TensorTree;
    /// Why a block cannot be had.
    type Error;

    /// How many there are.
    fn count(&self) -> usize;

    /// Block `index`, whose tensors may be shared with the network or read for this call.
    ///
    /// # Errors
    /// A block that is not resident and cannot be read.
    fn block(&self, index: usize) -> Result<Self::Block, Self::Error>;

    /// Path of block `index` in the network, in front of the paths of its parameters.
    fn path(&self, index: usize) -> String;

    /// What `block` makes of `carry`.
    fn apply(block: &Self::Block, carry: Self::Carry, shared: &Self::Shared) -> Self::Carry;
}

/// How many blocks of a chain are computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recomputed {
    /// Blocks, from the first on; of all others the whole graph is kept.
    pub blocks: usize,
    /// Of these, from the last on, those of which the results of [`computed_once`](crate::ops::computed_once) are kept beside their input: when the backward
    /// pass comes to the first blocks, they are gone.
    pub with_results: usize,
}

impl Recomputed {
    /// The first so many, of which only the input is kept.
    pub fn first(blocks: usize) -> Self {
        Self {
            blocks,
            with_results: 0,
        }
    }
}

/// What enters a chain: the input of its first block, and what all blocks share.
pub type Entry<B> = (<B as Blocks>::Carry, <B as Blocks>::Shared);

/// The forward pass of a chain of blocks, with what its backward pass needs.
pub struct Chain<'a, B: Blocks> {
    blocks: &'a B,
    /// Input of each block, and what is kept of its first run.
    kept: Vec<(B::Carry, Results)>,
    shared: B::Shared,
}

impl<'a, B: Blocks> Chain<'a, B> {
    /// Runs the blocks that are computed again without a graph; what follows the chain may be further blocks. `carry` and
    /// `shared` are off the autodiff device, and so is the result.
    ///
    /// # Errors
    /// A block that cannot be had.
    pub fn run(
        blocks: &'a B,
        recomputed: Recomputed,
        carry: B::Carry,
        shared: B::Shared,
    ) -> Result<(Self, B::Carry), B::Error> {
        let lifted = shared.clone().lift();
        let mut kept = Vec::new();
        let mut current = carry;
        let count = recomputed.blocks.min(blocks.count());
        for index in 0..count {
            let block = blocks.block(index)?.no_grad();
            let input = current.clone();
            let run = match count - index <= recomputed.with_results {
                true => Run::First(Results::new()),
                false => Run::Only,
            };
            let running = Running::begin(run);
            current = B::apply(&block, current.lift(), &lifted).inner();
            kept.push((input, running.end()));
        }
        let chain = Self {
            blocks,
            kept,
            shared,
        };
        Ok((chain, current))
    }

    /// Adds the gradients of the blocks' trainable parameters to `into`, given that of the chain's output.
    ///
    /// `shared` is the gradient of the shared input, as far as what follows the chain gave it, or none where nothing in front of
    /// the chain is trained. Where it is given, the gradients of the chain's input and of the shared input, from the blocks
    /// too, are returned.
    ///
    /// # Errors
    /// A block that cannot be had.
    pub fn backward(
        self,
        carry: B::Carry,
        shared: Option<B::Shared>,
        into: &mut Gradients,
    ) -> Result<Option<Entry<B>>, B::Error> {
        let (mut upstream, mut shared_gradient) = (carry, shared);
        for (index, (input, results)) in self.kept.into_iter().enumerate().rev() {
            let block = self.blocks.block(index)?;
            let shared = match shared_gradient {
                Some(_) => self.shared.clone().leaf(),
                None => self.shared.clone().lift(),
            };
            let carry = match index > 0 || shared_gradient.is_some() {
                true => input.leaf(),
                false => input.lift(),
            };
            let running = Running::begin(Run::Second(results));
            let output = B::apply(&block, carry.clone(), &shared);
            drop(running);
            let Some(dot) = output.dot(upstream.clone().lift()) else {
                continue;
            };
            if !dot.is_tracked() {
                continue; // the first block, if nothing in it is trained
            }
            let mut gradients = dot.backward();
            upstream = carry.take_gradient(&mut gradients);
            shared_gradient =
                shared_gradient.map(|gradient| gradient.plus(shared.take_gradient(&mut gradients)));
            into.take(&self.blocks.path(index), &block, &mut gradients);
        }
        Ok(shared_gradient.map(|shared| (upstream, shared)))
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use burn::backend::flex::FlexTensor;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;
    use crate::ops::check::random;
    use crate::ops::kernel::{packed, tensor, values as values_of};
    use crate::ops::{Operation, apply, computed_once};
    use crate::peft::{InitLoraWeights, Targets};
    use crate::{LoraConfig, attach, last_linear, linear};

    thread_local! {
        /// Of what each run of a block added last.
        static SIZES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        /// Times that the first part of a block was computed.
        static COMPUTED: Cell<usize> = const { Cell::new(0) };
    }

    /// `x²`, computed once.
    #[derive(Debug, Clone)]
    struct Square;

    impl Operation<1> for Square {
        type Saved = FlexTensor;

        fn forward(&self, inputs: Vec<FlexTensor>) -> (FlexTensor, FlexTensor) {
            let x = packed(inputs.into_iter().next().expect("one input"));
            computed_once(false, || x.clone());
            let y = computed_once(true, || {
                COMPUTED.set(COMPUTED.get() + 1);
                map([&x], |[x]| x * x)
            });
            (y, x)
        }

        fn backward(&self, x: FlexTensor, g: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
            [Some(map([&x, &packed(g)], |[x, g]| 2.0 * x * g))]
        }
    }

    fn map<const K: usize>(x: [&FlexTensor; K], f: impl Fn([f32; K]) -> f32) -> FlexTensor {
        let elements = 0..values_of(x[0]).len();
        let y = elements.map(|i| f(x.map(|x| values_of(x)[i])));
        tensor(y.collect(), x[0].layout().shape().clone())
    }

    #[derive(Module, Debug)]
    struct Block {
        up: Linear,
        down: Linear,
    }

    #[derive(Module, Debug)]
    struct Model {
        first: Linear,
        blocks: Vec<Block>,
    }

    impl Model {
        fn new(targets: &str) -> Self {
            let device = Device::flex().autodiff();
            let layer = |inputs, outputs| Linear {
                weight: burn::module::Param::from_tensor(random([inputs, outputs]).detach()),
                ..LinearConfig::new(inputs, outputs).init(&device)
            };
            let block = |_| Block {
                up: layer(8, 20),
                down: layer(20, 8),
            };
            let model = Self {
                first: layer(8, 8),
                blocks: (0..3).map(block).collect(),
            };
            let config = LoraConfig {
                r: 3,
                target_modules: Targets::Pattern(targets.into()),
                init_lora_weights: InitLoraWeights::Random,
                ..LoraConfig::default()
            };
            attach(model, config.fresh(1).fast()).expect("an adapter on every target")
        }
    }

    impl Blocks for Model {
        type Block = Block;
        type Carry = Tensor<2>;
        type Shared = Tensor<2>;
        type Error = Infallible;

        fn count(&self) -> usize {
            self.blocks.len()
        }

        fn block(&self, index: usize) -> Result<Block, Infallible> {
            Ok(self.blocks[index].clone())
        }

        fn path(&self, index: usize) -> String {
            format!("blocks.{index}")
        }

        fn apply(block: &Block, x: Tensor<2>, shared: &Tensor<2>) -> Tensor<2> {
            let hidden = linear(&block.up, x.clone()).into_dispatch();
            let hidden = burn::tensor::activation::tanh(apply::<_, 1, 2>(Square, vec![hidden]));
            let last = last_linear(&block.down, hidden);
            let size = last.clone().abs().max().into_scalar::<f32>();
            SIZES.with_borrow_mut(|sizes| sizes.push(size));
            x * shared.clone() + last
        }
    }

    fn values(gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
        let values = |g: &Tensor<1>| g.clone().into_data().try_into_vec().expect("f32");
        let pairs = gradients.iter();
        pairs.map(|(path, g)| (path.into(), values(g))).collect()
    }

    /// Gradients of the mean square: by plain autodiff, and with every block computed again.
    fn both(model: &Model, enters: bool, with_results: usize) -> [BTreeMap<String, Vec<f32>>; 2] {
        let (x, s) = (random([5, 8]), random([5, 8]));
        let mut plain = Gradients::default();
        let y = model
            .blocks
            .iter()
            .fold(linear(&model.first, x.clone()), |x, block| {
                Model::apply(block, x, &s)
            });
        plain.take("", model, &mut y.clone().square().sum().backward());
        SIZES.take();
        COMPUTED.take();

        let mut again = Gradients::default();
        let entered = linear(&model.first, x);
        let (chain, last) = Chain::run(
            model,
            Recomputed {
                blocks: 3,
                with_results,
            },
            entered.clone().inner(),
            TensorTree::inner(s.clone()),
        )
        .expect("blocks in memory");
        let shared = enters.then(|| TensorTree::inner(s.zeros_like()));
        let gradient = last.mul_scalar(2.0);
        let upstream = chain.backward(gradient, shared, &mut again);
        let upstream = upstream.expect("blocks in memory");
        assert_eq!(upstream.is_some(), enters);
        if let Some((upstream, _)) = upstream {
            let dot = entered.dot(upstream.lift()).expect("one tensor");
            again.take("", model, &mut dot.backward());
        }
        [values(&plain), values(&again)]
    }

    #[test]
    fn blocks_computed_again_give_the_bits_of_plain_autodiff() {
        for (targets, enters) in [
            ("all-linear", true),
            (r"blocks\.\d\.(up|down)", false),
            (r"blocks\.[12]\.down", false),
            (r"blocks\.1\.up", false),
        ] {
            for with_results in 0..=3 {
                let [plain, again] = both(&Model::new(targets), enters, with_results);
                assert!(!plain.is_empty());
                assert!(plain == again, "{targets}, {with_results}");
                assert_eq!(COMPUTED.get(), 6 - with_results);
            }
        }
    }

    /// A model whose blocks lose the weight of their first layer after their first run.
    struct Spoiled<'a>(&'a Model, Cell<usize>);

    impl Blocks for Spoiled<'_> {
        type Block = Block;
        type Carry = Tensor<2>;
        type Shared = Tensor<2>;
        type Error = Infallible;

        fn count(&self) -> usize {
            self.0.count()
        }

        fn block(&self, index: usize) -> Result<Block, Infallible> {
            let mut block = self.0.blocks[index].clone();
            if self.1.replace(self.1.get() + 1) >= self.count() {
                block.up = LinearConfig::new(8, 20).init(&Device::flex().autodiff());
            }
            Ok(block)
        }

        fn path(&self, index: usize) -> String {
            self.0.path(index)
        }

        fn apply(block: &Block, x: Tensor<2>, shared: &Tensor<2>) -> Tensor<2> {
            Model::apply(block, x, shared)
        }
    }

    #[test]
    fn what_linear_layers_gave_is_not_computed_again_where_it_is_kept() {
        let model = Model::new(r"blocks\.\d\.down");
        let [x, s] = [random([5, 8]), random([5, 8])].map(TensorTree::inner);
        // The gradient of the last block's `down` reads what `up` gave, and nothing that `up` has.
        let gradients = |with_results| {
            let mut gradients = Gradients::default();
            let recomputed = Recomputed {
                blocks: 3,
                with_results,
            };
            let spoiled = Spoiled(&model, Cell::new(0));
            let (chain, last) =
                Chain::run(&spoiled, recomputed, x.clone(), s.clone()).expect("blocks in memory");
            let entry = chain.backward(last, None, &mut gradients);
            assert!(entry.expect("blocks in memory").is_none());
            let mut gradients = values(&gradients);
            gradients.retain(|path, _| path.starts_with("blocks.2.down."));
            assert_eq!(gradients.len(), 2);
            gradients
        };
        let [none, one, all] = [0, 1, 3].map(gradients);
        assert!(one == all);
        assert!(none != one);
    }

    #[test]
    fn the_last_layer_of_a_block_is_not_computed_a_second_time() {
        both(&Model::new("all-linear"), true, 0);
        let sizes = SIZES.take();
        assert!(sizes[..3].iter().all(|&size| size > 0.0), "{sizes:?}");
        assert_eq!(sizes[3..], [0.0; 3]);
    }
}
