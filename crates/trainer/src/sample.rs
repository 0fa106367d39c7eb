//! `flux-lora sample`: images from prompts, one or a grid of them.

use std::path::PathBuf;

use anyhow::{Context, bail};
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use flux_model::families::{self, Visitor};
use flux_model::family::{Condition, Family, TextEncoders};
use flux_model::lora::Component;
use flux_model::pipeline::PipelineFolder;
use serde_json::json;

use crate::adapters::{self, AttachLoras, LoadedLora};
use crate::cli::{SampleArgs, UsageError};
use crate::convert::load_loras;
use crate::generate::{ImageSettings, Start, decode, encode, generate_latents, skipped_steps};
use crate::given::GivenPictures;
use crate::grid::Grid;
use crate::image_file::ImagePlace;
use crate::models::open_pipeline;
use crate::output::Output;
use crate::progress::Bar;
use crate::{device, memory, progress};

/// How much of a start picture is made anew if nothing else is said, as in diffusers.
const STRENGTH: f64 = 0.6;

/// Draws what is asked for, writes it and says where it is.
///
/// # Errors
/// Arguments that do not fit, files that cannot be read or written.
pub(crate) fn sample(args: &SampleArgs, output: Output) -> anyhow::Result<()> {
    let whole = ImagePlace::new(&args.out, args.overwrite)?;
    let paths = single_paths(args);
    let singles: Vec<ImagePlace> = paths
        .iter()
        .map(|path| ImagePlace::new(path, args.overwrite))
        .collect::<anyhow::Result<_>>()?;
    let grid = draw(args)?;
    let (width, height) = grid.pictures[0].dimensions();
    let size = ("size", json!(format!("{width} x {height}")));
    if singles.is_empty() {
        whole.write(&grid.pictures[0])?;
        output.result("image", &[("image", json!(args.out)), size])?;
        return Ok(());
    }
    for (place, image) in singles.iter().zip(&grid.pictures) {
        place.write(image)?;
    }
    whole.write(&grid.draw())?;
    let grid = ("grid", json!(args.out));
    output.result("images", &[("image", json!(paths)), size, grid])?;
    Ok(())
}

/// Where each image goes, if there are several: the grid's name with a number, row by row.
fn single_paths(args: &SampleArgs) -> Vec<PathBuf> {
    let count = args.prompt.len() * args.seed.len() * (1 + usize::from(args.compare));
    let stem = args.out.file_stem().unwrap_or_default().to_string_lossy();
    let extension = args.out.extension().unwrap_or_default().to_string_lossy();
    match count {
        1 => Vec::new(),
        _ => (1..=count)
            .map(|number| {
                args.out
                    .with_file_name(format!("{stem}-{number}.{extension}"))
            })
            .collect(),
    }
}

/// Every prompt with every seed; a column a prompt, a row a seed, with `compare` one without the LoRAs above it.
///
/// # Errors
/// Arguments that do not fit the model, files that cannot be read.
pub(crate) fn draw(args: &SampleArgs) -> anyhow::Result<Grid> {
    struct Draw<'a>(PipelineFolder, &'a SampleArgs);
    impl Visitor for Draw<'_> {
        type Output = anyhow::Result<Grid>;
        fn visit<F: Family>(self) -> Self::Output {
            draw_family(&F::open(self.0)?, self.1)
        }
    }
    let transformer = args.transformer.as_deref();
    let folder = open_pipeline(&args.model, transformer, None, args.offline)?;
    families::of_folder(&folder.clone(), Draw(folder, args))?
}

fn draw_family<F: Family>(family: &F, args: &SampleArgs) -> anyhow::Result<Grid> {
    let named = device::open(args.device.as_deref().unwrap_or(device::default_name()))?;
    let device = named.device.clone();
    let usual = family.sampling();
    let steps = args.steps.unwrap_or(usual.num_inference_steps);
    let guidance_scale = args.guidance.unwrap_or(usual.guidance_scale);
    let given = GivenPictures::read(args, family)?;
    let height = args.height.unwrap_or(given.size.height_px as usize);
    let width = args.width.unwrap_or(given.size.width_px as usize);
    let smallest = family.pixel_step();
    check(args, steps, [height, width], smallest)?;
    let outline = family.outline(&device).context("open the transformer")?;
    if let Some(problem) = family.problem(&outline) {
        bail!("{problem}");
    }
    given.kinds().check(family, &outline)?;
    drop(outline);
    let loras = load_loras(&args.lora, family.folder())?;

    // Without the LoRAs first, where that is asked for.
    let variants: Vec<&[LoadedLora]> = match args.compare {
        true => vec![&[], &loras],
        false => vec![&loras],
    };
    let texts: Vec<Texts<F>> = variants
        .iter()
        .map(|loras| encode_prompts(family, args, guidance_scale, loras, &device))
        .collect::<anyhow::Result<_>>()?;
    let size = [height, width].map(|side| side / smallest * smallest);
    let starts = match given.start(size) {
        Some(picture) => {
            let autoencoder = family
                .autoencoder(&device)
                .context("load the autoencoder")?;
            let latents = |seed: &u64| encode(family, &autoencoder, &picture, *seed, &device);
            args.seed.iter().map(|seed| Some(latents(seed))).collect()
        }
        None => vec![None; args.seed.len()],
    };
    let condition = given.encode(family, size, &device)?;

    let must_be_resident = adapters::changes_weights(Component::Transformer, &loras);
    let base = memory::base_for_sampling(family, must_be_resident, &named)?;
    let network = family.network(base, &device);
    let mut network = network.context("load the transformer")?;
    let rows = variants.len() * args.seed.len();
    let made = steps - skipped_steps(steps, strength(args));
    let bar = progress::bar("denoise", (rows * args.prompt.len() * made) as u64);
    let mut latents: Vec<Vec<Tensor<4>>> = vec![Vec::new(); rows];
    for (variant, (loras, texts)) in variants.iter().zip(&texts).enumerate() {
        network = adapters::attach(network, Component::Transformer, loras)?.no_grad();
        for (index, (&seed, start)) in args.seed.iter().zip(&starts).enumerate() {
            let settings = ImageSettings {
                height_px: height,
                width_px: width,
                num_inference_steps: steps,
                guidance_scale,
                seed,
                start: start.clone().map(|latents| Start {
                    latents,
                    strength: strength(args),
                }),
            };
            let row = &mut latents[index * variants.len() + variant];
            *row = draw_row(
                family, &network, texts, &condition, &settings, &bar, &device,
            )?;
        }
    }
    bar.finish_and_clear();
    drop(network);

    let autoencoder = family
        .autoencoder(&device)
        .context("load the autoencoder")?;
    let pictures = latents.into_iter().flatten();
    Ok(Grid {
        columns: args.prompt.clone(),
        rows: row_names(args),
        pictures: pictures
            .map(|latents| decode::<F>(&autoencoder, latents))
            .collect(),
    })
}

fn strength(args: &SampleArgs) -> f64 {
    match (&args.image, &args.mask) {
        (Some(_), None) => args.strength.unwrap_or(STRENGTH),
        _ => 1.0,
    }
}

fn check(
    args: &SampleArgs,
    steps: usize,
    [height, width]: [usize; 2],
    smallest: usize,
) -> Result<(), UsageError> {
    if steps == 0 || height < smallest || width < smallest || args.max_sequence_length == 0 {
        return Err(UsageError(format!(
            "--steps must be at least 1, --height and --width at least {smallest}"
        )));
    }
    let strength = strength(args);
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(UsageError(format!(
            "--strength must be above 0 and at most 1, found {strength}"
        )));
    }
    if skipped_steps(steps, strength) == steps {
        return Err(UsageError(format!(
            "--strength {strength} leaves none of {steps} steps: raise one of them"
        )));
    }
    Ok(())
}

/// Prompts as the networks read them.
struct Texts<F: Family> {
    prompts: Vec<F::Text>,
    negative: Option<F::Text>,
}

fn encode_prompts<F: Family>(
    family: &F,
    args: &SampleArgs,
    guidance_scale: f32,
    loras: &[LoadedLora],
    device: &Device,
) -> anyhow::Result<Texts<F>> {
    let encoders = family
        .text_encoders(device)
        .context("load the text encoders")?
        .adapt(&AttachLoras(loras))?;
    let negative = family.negative_prompt(guidance_scale);
    let all: Vec<&str> = args
        .prompt
        .iter()
        .map(String::as_str)
        .chain(negative)
        .collect();
    let texts = encoders.encode(&all, args.max_sequence_length, device)?;
    let mut prompts: Vec<F::Text> = texts
        .into_iter()
        .map(|parts| F::text(parts, device))
        .collect();
    let negative = negative.and_then(|_| prompts.pop());
    Ok(Texts { prompts, negative })
}

/// The latents of every prompt.
fn draw_row<F: Family>(
    family: &F,
    network: &F::Network,
    texts: &Texts<F>,
    condition: &Condition,
    settings: &ImageSettings,
    bar: &Bar,
    device: &Device,
) -> anyhow::Result<Vec<Tensor<4>>> {
    let draw = |text: &F::Text| {
        generate_latents(
            family,
            network,
            text,
            texts.negative.as_ref(),
            condition,
            settings.clone(),
            device,
            |_| bar.inc(1),
        )
    };
    Ok(texts.prompts.iter().map(draw).collect::<Result<_, _>>()?)
}

fn row_names(args: &SampleArgs) -> Vec<String> {
    let variants: &[&str] = match args.compare {
        true => &["without LoRA", "with LoRA"],
        false => &[""],
    };
    let seed = |seed: &u64| match args.seed.len() {
        1 => String::new(),
        _ => format!("seed {seed}"),
    };
    args.seed
        .iter()
        .flat_map(|it| variants.iter().map(move |variant| (it, variant)))
        .map(|(it, variant)| format!("{variant} {}", seed(it)).trim().to_string())
        .collect()
}
