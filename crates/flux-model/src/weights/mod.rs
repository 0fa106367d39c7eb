//! Loading: from a checkpoint's tensors into a network, each tensor used exactly or named in an error.
//!
//! A network's parameter path is its diffusers key, but for two things Burn does otherwise: norms call their parameters
//! `gamma` and `beta`, and a linear weight is `[in, out]`. Single files in BFL's layout are read through [`keys`].
//!
//! [`keys`]: mod@crate::flux1::keys

pub use self::checkpoint::Checkpoint;
pub use self::compute::Compute;
pub use self::kept::KeptWeights;
pub use self::layout::Layout;
pub use self::load::Base;
pub use self::parameters::{change_parameters, checkpoint_tensors, tensors_of};
pub use self::sizes::{BlockSize, Sizes};
pub use self::storage::BaseDtype;
pub use self::stream::Stream;

mod architecture;
mod checkpoint;
mod compute;
mod find;
mod keep;
mod kept;
mod layout;
mod load;
mod parameters;
mod sizes;
mod storage;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_base;
#[cfg(test)]
mod tests_compute;
#[cfg(test)]
mod tests_few_bits;
mod walk;
