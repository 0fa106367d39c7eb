//! Trains a LoRA on the bundled photographs with the `cuda` backend.
//!
//! `cargo run --release --example train_cuda --features cuda`

fn main() -> anyhow::Result<()> {
    flux_lora_examples::train_on("cuda")
}
