//! Trains a LoRA on the bundled photographs with the `wgpu` backend.
//!
//! `cargo run --release --example train_wgpu --features wgpu`

fn main() -> anyhow::Result<()> {
    flux_lora_examples::train_on("wgpu")
}
