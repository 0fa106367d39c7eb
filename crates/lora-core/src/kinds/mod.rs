//! What is trained: the kinds of adapter, what each consists of and how it starts.

pub(crate) mod factors;
pub(crate) mod lycoris;
pub(crate) mod split;
