//! PEFT's configuration, names and files.

pub(crate) mod config;
pub(crate) mod file;
pub(crate) mod folder;
pub(crate) mod form;
pub(crate) mod selection;
