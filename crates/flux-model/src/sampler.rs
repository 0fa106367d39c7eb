//! Noise to latents: the Euler steps of one image.

use burn::tensor::Tensor;

use crate::error::WeightsError;
use crate::family::{Condition, Family, Velocity};
use crate::scheduler::euler_step;

/// What one denoising run is made with.
#[derive(Debug, Clone)]
pub struct Denoise<'a, F: Family> {
    /// The pipeline.
    pub family: &'a F,
    /// Its network, maybe with adapters.
    pub network: &'a F::Network,
    /// What to show.
    pub text: &'a F::Text,
    /// What to steer away from, see [`Family::negative_prompt`].
    pub negative: Option<&'a F::Text>,
    /// Pictures beside the prompt.
    pub condition: &'a Condition,
    /// Height and width of the latents.
    pub grid: [usize; 2],
    /// Steps from noise to image.
    pub steps: usize,
    /// Of these, how many at the noisy end are left out; the tokens are those of an image with the noise that is left.
    pub skip: usize,
    /// Guidance strength.
    pub guidance_scale: f32,
}

/// One step that was made.
#[derive(Debug)]
pub struct Step<'a> {
    /// From 0.
    pub index: usize,
    /// The velocity that was followed.
    pub velocity: &'a Tensor<3>,
    /// With a negative prompt: what the network said of the prompt, and of the negative one.
    pub sides: Option<(&'a Tensor<3>, &'a Tensor<3>)>,
    /// The tokens after the step.
    pub tokens: &'a Tensor<3>,
}

impl<F: Family> Denoise<'_, F> {
    /// The noise level of the tokens that the first step gets.
    pub fn first_sigma(&self, image_tokens: usize) -> f32 {
        self.family.sigmas(self.steps, image_tokens)[self.skip]
    }

    /// Runs the steps from the noisy `tokens`, `[batch, img_tokens, channels]`; `on_step` sees every one.
    ///
    /// # Errors
    /// A block that is not resident and cannot be read.
    pub fn run(
        &self,
        tokens: Tensor<3>,
        mut on_step: impl FnMut(Step<'_>),
    ) -> Result<Tensor<3>, WeightsError> {
        let [batch, image_tokens, _] = tokens.dims();
        let sigmas = self.family.sigmas(self.steps, image_tokens);
        let mut tokens = tokens;
        for (index, pair) in sigmas.windows(2).enumerate().skip(self.skip) {
            let velocity = |text: &F::Text| {
                self.network.forward(F::input(
                    tokens.clone(),
                    self.grid,
                    text.clone(),
                    vec![pair[0]; batch],
                    vec![self.guidance_scale; batch],
                    self.condition.clone(),
                ))
            };
            let positive = velocity(self.text)?;
            let negative = self.negative.map(velocity).transpose()?;
            let followed = match &negative {
                None => positive.clone(),
                Some(negative) => {
                    negative.clone() + (positive.clone() - negative.clone()) * self.guidance_scale
                }
            };
            tokens = euler_step(tokens, followed.clone(), pair[0], pair[1]);
            on_step(Step {
                index,
                velocity: &followed,
                sides: negative.as_ref().map(|negative| (&positive, negative)),
                tokens: &tokens,
            });
        }
        Ok(tokens)
    }
}
