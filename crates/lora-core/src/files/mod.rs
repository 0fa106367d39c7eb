//! Files as foreign input and as durable output. Knows nothing of Burn.

pub mod digest;
pub mod host;
mod mapped;
pub mod quantised;
pub mod replace;
pub mod safetensors;
pub mod strict_json;
