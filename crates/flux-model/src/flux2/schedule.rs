//! How far the noise levels of FLUX.2 are shifted: by the number of image tokens and of steps.

/// Shift exponent for an image of `image_tokens` tokens (those of reference pictures not counted) in `steps` steps.
///
/// Two lines in the number of tokens, one fitted at 10 steps and one at 200, and between them a line in the number of
/// steps; above 4300 tokens the one of 200 steps alone.
///
/// # Source
/// diffusers 0.38 `pipeline_flux2.compute_empirical_mu`; black-forest-labs/flux2 `sampling.py`.
pub fn empirical_mu(image_tokens: usize, steps: usize) -> f64 {
    let (tokens, steps) = (image_tokens as f64, steps as f64);
    let at_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    let at_200 = 0.000_169_27 * tokens + 0.456_666_66;
    if image_tokens > 4300 {
        return at_200;
    }
    let slope = (at_200 - at_10) / 190.0;
    slope * steps + at_200 - 200.0 * slope
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::SchedulerConfig;

    #[test]
    fn the_published_exponents() {
        for (tokens, steps, expected) in [
            (15, 4, 1.94513),
            (256, 1, 1.98800),
            (1024, 50, 1.70196),
            (4096, 28, 2.15144),
            (4300, 4, 2.30848),
            (4301, 4, 1.18470), // it jumps
            (8160, 50, 1.83791),
        ] {
            let mu = empirical_mu(tokens, steps);
            assert!((mu - expected).abs() < 1e-5, "{tokens} {steps}: {mu}");
        }
    }

    #[test]
    fn four_steps_of_a_1024_pixel_image() {
        let config = SchedulerConfig {
            use_dynamic_shifting: true,
            ..SchedulerConfig::default()
        };
        let sigmas = config.sigmas_shifted(4, empirical_mu(4096, 4));
        for (sigma, expected) in sigmas.iter().zip([1.0, 0.967384, 0.908144, 0.7672, 0.0]) {
            assert!((sigma - expected).abs() < 1e-6, "{sigmas:?}");
        }
    }
}
