//! Trains a LoRA on the bundled photographs with the `flex` backend.
//!
//! `cargo run --release --example train_flex --features flex`

fn main() -> anyhow::Result<()> {
    flux_lora_examples::train_on("flex")
}
