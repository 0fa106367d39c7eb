//! What names a model on the command line and in `model.path`: a pipeline folder, a repository of the Hub, or a single
//! transformer file that lies in a pipeline.

use std::path::Path;

use flux_model::pipeline::PipelineFolder;

use crate::hub::{Replaced, folder_of};

/// Opens the pipeline that `model` names, with single files in place of its transformer and autoencoder; a repository of the
/// Hub is downloaded first, without what those files replace.
///
/// # Errors
/// Nothing of that name, or something else than a pipeline.
pub fn open_pipeline(
    model: &Path,
    transformer: Option<&Path>,
    vae: Option<&Path>,
    offline: bool,
) -> anyhow::Result<PipelineFolder> {
    let replaced = Replaced {
        transformer: transformer.is_some(),
        vae: vae.is_some(),
    };
    let mut pipeline = match around(model).filter(|_| transformer.is_none()) {
        Some(folder) => PipelineFolder::open(folder)?.with_transformer(model),
        None => PipelineFolder::open(&folder_of(model, replaced, offline)?)?,
    };
    if let Some(file) = transformer {
        pipeline = pipeline.with_transformer(file);
    }
    if let Some(file) = vae {
        pipeline = pipeline.with_autoencoder(file);
    }
    Ok(pipeline)
}

/// The pipeline folder that a single file lies in, or in a folder of: repositories have `flux1-dev.safetensors` beside the
/// components.
fn around(file: &Path) -> Option<&Path> {
    let is_weights = file
        .extension()
        .is_some_and(|extension| extension == "safetensors");
    if !is_weights || !file.is_file() {
        return None;
    }
    let above = file.ancestors().skip(1).take(2);
    above
        .into_iter()
        .find(|folder| folder.join("model_index.json").is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_single_file_finds_the_pipeline_it_lies_in() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("FLUX.1-dev");
        fs::create_dir(&folder).expect("writable");
        let file = folder.join("flux1-dev.safetensors");
        fs::write(&file, "").expect("writable");
        let error = open_pipeline(&file, None, None, true).expect_err("no pipeline is near");
        assert!(
            error
                .to_string()
                .contains("this file as `model.transformer`"),
            "{error}"
        );
        fs::write(
            folder.join("model_index.json"),
            "{\"_class_name\": \"FluxPipeline\"}",
        )
        .expect("writable");
        let pipeline = open_pipeline(&file, None, None, true).expect("a pipeline");
        assert_eq!(pipeline.transformer_path(), file);
        assert_eq!(pipeline.root(), folder);
        let other = root.path().join("other.safetensors");
        let pipeline = open_pipeline(&folder, Some(&other), Some(&file), true).expect("a pipeline");
        assert_eq!(pipeline.transformer_path(), other);
        assert_eq!(pipeline.autoencoder_path(), file);
    }
}
