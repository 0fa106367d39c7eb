//! The encoder on disk.
//!
//! The weights of a layer are needed once per batch and take gigabytes together, so none stays: a layer is read, run and
//! dropped, and of the embedding only the rows that occur are read.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};

use super::network::Layer;
use super::rotary::HalfSplitRotary;
use super::{DecoderConfig, DecoderText};
use crate::error::WeightsError;
use crate::text::embedding::embed;
use crate::weights::{BaseDtype, Checkpoint, Layout, Stream};

/// A language model whose layers stay on disk.
pub struct DecoderEncoder {
    /// Without values.
    network: DecoderText,
    stream: Stream,
    config: DecoderConfig,
    device: Device,
}

/// Where a checkpoint has a language model: inside one that also sees, as transformers wrote it before and since its version
/// 4.52, or alone.
const INSIDE: [&str; 3] = ["language_model.model", "model.language_model", "model"];

impl DecoderEncoder {
    /// Opens a component folder, looks at the name and shape of every tensor, and reads no weight. What a model that also sees
    /// has besides its language model (`vision_tower`, `multi_modal_projector`) is left unread.
    ///
    /// # Errors
    /// A malformed file, or a tensor that is missing, left over or of another shape.
    pub fn open(folder: &Path, device: &Device) -> Result<Self, WeightsError> {
        let config = DecoderConfig::read(&folder.join("config.json"))?;
        let network = DecoderText::new(&config, device);
        let checkpoint = Checkpoint::open(folder)?;
        let has = |inside: &str| {
            let embedding = format!("{inside}.embed_tokens.weight");
            checkpoint.shape(&embedding).is_some()
        };
        let inside = INSIDE.into_iter().find(|inside| has(inside));
        let layout = Layout::LanguageModel {
            inside: inside.unwrap_or("model"),
        };
        let blocks = network.blocks();
        let (network, stream) =
            checkpoint.stream(network, blocks, layout, BaseDtype::AsStored, device)?;
        Ok(Self {
            network,
            stream,
            config,
            device: device.clone(),
        })
    }

    /// The architecture.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The residual stream after each of `layers` layers, `[batch, tokens, hidden_size]`; 0 is the embedding.
    ///
    /// `ids` is one row of token ids per prompt, padded to one length; where `mask` is 0 no token is looked at, but its own
    /// row is computed as any other. Padding in front of a prompt sees nothing, itself included: attention adds nothing to it,
    /// as in PyTorch's `scaled_dot_product_attention` since 2.5.
    ///
    /// # Errors
    /// Weights that cannot be read, an id outside the vocabulary, a layer that the network does not have, ragged rows, a row
    /// of padding alone.
    pub fn hidden_states(
        &self,
        ids: &[Vec<i64>],
        mask: &[Vec<i64>],
        layers: &[usize],
    ) -> Result<Vec<Tensor<3>>, WeightsError> {
        let config = &self.config;
        let tokens = ids.first().map_or(0, Vec::len);
        let rows = ids.iter().chain(mask);
        if tokens == 0 || ids.len() != mask.len() || rows.clone().any(|row| row.len() != tokens) {
            return Err(self.refuse("its token ids and mask must be rows of one length".into()));
        }
        let last = layers.iter().copied().max().unwrap_or(0);
        if last > config.num_hidden_layers {
            let count = config.num_hidden_layers;
            return Err(self.refuse(format!("it has {count} layers, {last} are asked for")));
        }
        let rotary = HalfSplitRotary::new(tokens, config, &self.device);
        let rows = ids.iter().zip(mask);
        let mut rows = rows
            .map(|(ids, mask)| self.prompt(ids, mask, &rotary))
            .collect::<Result<Vec<_>, _>>()?;
        let mut states = BTreeMap::new();
        for done in 0..=last {
            if layers.contains(&done) {
                let hidden = rows.iter().map(Prompt::hidden).collect();
                states.insert(done, Tensor::cat(hidden, 0));
            }
            if done < last {
                let (block, layer) = self.network.layer(done);
                let layer = self.stream.fill(block, layer)?;
                for row in &mut rows {
                    row.pass(&layer); // one prompt's scores at a time
                }
            }
        }
        Ok(layers.iter().map(|layer| states[layer].clone()).collect())
    }

    fn prompt(
        &self,
        ids: &[i64],
        mask: &[i64],
        rotary: &HalfSplitRotary,
    ) -> Result<Prompt, WeightsError> {
        let embed = |ids: &[i64]| embed(&self.stream, ids, self.config.vocab_size, &self.device);
        let Some(before) = mask.iter().position(|&seen| seen != 0) else {
            return Err(self.refuse("a prompt must not be padding alone".into()));
        };
        let padding = &ids[..before];
        let alike = padding.windows(2).all(|pair| pair[0] == pair[1]);
        Ok(Prompt {
            before,
            padding: match padding {
                [] => None,
                _ if alike => Some(embed(&padding[..1])?),
                _ => Some(embed(padding)?),
            },
            text: embed(&ids[before..])?,
            rotary: rotary.from(before),
            bias: attention_bias(&mask[before..], &self.device),
        })
    }

    fn refuse(&self, reason: String) -> WeightsError {
        WeightsError::Config {
            path: self.stream.checkpoint().path().into(),
            reason,
        }
    }
}

/// A prompt on its way through the layers.
struct Prompt {
    /// Tokens of padding before the text.
    before: usize,
    /// `[1, before, hidden_size]`, or one row where all are alike; they look at nothing and nothing looks at them.
    padding: Option<Tensor<3>>,
    /// From the first token on that is looked at.
    text: Tensor<3>,
    rotary: HalfSplitRotary,
    bias: Tensor<4>,
}

impl Prompt {
    fn pass(&mut self, layer: &Layer) {
        self.text = layer.forward(self.text.clone(), &self.rotary, &self.bias);
        self.padding = self.padding.take().map(|rows| layer.forward_alone(rows));
    }

    /// `[1, tokens, hidden_size]`.
    fn hidden(&self) -> Tensor<3> {
        let text = self.text.clone();
        match &self.padding {
            None => text,
            Some(rows) => {
                let padding = rows.clone().expand([1, self.before, text.dims()[2]]);
                Tensor::cat(vec![padding, text], 1)
            }
        }
    }
}

/// `[1, 1, tokens, tokens]`: 0 where a query may look at a key, not past itself and not at padding; else the largest
/// negative f32, which softmax turns into zeros.
fn attention_bias(mask: &[i64], device: &Device) -> Tensor<4> {
    let tokens = mask.len();
    let mut values = Vec::with_capacity(tokens * tokens);
    for query in 0..tokens {
        let sees = |key: usize| key <= query && mask[key] != 0;
        values.extend((0..tokens).map(|key| if sees(key) { 0.0 } else { f32::MIN }));
    }
    Tensor::from_data(TensorData::new(values, [1, 1, tokens, tokens]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/parity/flux2_qwen3/model"
    );

    #[test]
    fn layers_past_the_last_one_asked_for_are_not_read() {
        // The last layer's weights are cut off, but for their names and shapes.
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["config.json", "model.safetensors"] {
            let from = Path::new(MODEL).join(name);
            let mut bytes = std::fs::read(from).expect("the fixture");
            if name.ends_with(".safetensors") {
                let end = bytes.len();
                bytes[end / 2..].fill(0xff); // not a number
            }
            std::fs::write(dir.path().join(name), bytes).expect("a copy");
        }
        let encoder = DecoderEncoder::open(dir.path(), &Device::flex()).expect("names are whole");
        let (ids, mask) = (vec![vec![1, 2]], vec![vec![1, 1]]);
        let states = encoder.hidden_states(&ids, &mask, &[0, 1]);
        assert_eq!(
            states.expect("the first layer is whole")[1].dims(),
            [1, 2, 24]
        );
        let error = encoder
            .hidden_states(&ids, &mask, &[5])
            .expect_err("not finite");
        assert!(error.to_string().contains("not finite"), "{error}");
    }

    #[test]
    fn padding_in_front_changes_no_row_of_the_text_and_is_one_row() {
        let encoder = DecoderEncoder::open(Path::new(MODEL), &Device::flex()).expect("the fixture");
        let rows = |ids: Vec<i64>, mask: Vec<i64>| -> Vec<f32> {
            let states = encoder
                .hidden_states(&[ids], &[mask], &[4])
                .expect("states");
            states[0].clone().into_data().try_into_vec().expect("f32")
        };
        let alone = rows(vec![5, 6], vec![1, 1]);
        let padded = rows(vec![3, 3, 5, 6], vec![0, 0, 1, 1]);
        let unlike = rows(vec![4, 3, 5, 6], vec![0, 0, 1, 1]);
        assert_eq!(padded[..24], padded[24..48]);
        assert_eq!(unlike[24..], padded[24..]);
        assert_ne!(unlike[..24], padded[..24]);
        for (padded, alone) in padded[48..].iter().zip(&alone) {
            assert!((padded - alone).abs() < 1e-4, "{padded} {alone}");
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_an_error() {
        let encoder = DecoderEncoder::open(Path::new(MODEL), &Device::flex()).expect("the fixture");
        let error = |ids: &[Vec<i64>], mask: &[Vec<i64>], layer: usize| {
            let states = encoder.hidden_states(ids, mask, &[layer]);
            states
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        let (ids, mask) = (vec![vec![1, 2]], vec![vec![1, 1]]);
        assert!(error(&ids, &mask, 6).contains("5 layers, 6 are asked for"));
        assert!(error(&[vec![1, 549]], &mask, 1).contains("no id 549"));
        assert!(error(&[vec![1, -1]], &mask, 1).contains("no id -1"));
        assert!(error(&ids, &[vec![1]], 1).contains("rows of one length"));
        assert!(error(&[], &[], 1).contains("rows of one length"));
        assert!(error(&ids, &[vec![0, 0]], 1).contains("padding alone"));
    }
}
