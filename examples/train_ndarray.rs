//! Trains a LoRA on the bundled photographs with the `ndarray` backend.
//!
//! `cargo run --release --example train_ndarray --features ndarray`

fn main() -> anyhow::Result<()> {
    flux_lora_examples::train_on("ndarray")
}
