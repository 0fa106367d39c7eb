//! Which families there are, and of which one a pipeline folder is.
//!
//! Whoever works with a pipeline is a [`Visitor`]. Another family is a folder beside these and a line in both functions.

use crate::error::WeightsError;
use crate::family::Family;
use crate::flux1::Flux1;
use crate::flux2::Flux2;
use crate::lora::ModelShape;
use crate::pipeline::PipelineFolder;

/// Work that is the same for every family.
pub trait Visitor {
    /// What comes out.
    type Output;

    /// Does it for the family `F`.
    fn visit<F: Family>(self) -> Self::Output;
}

/// Lets `visitor` work for the family of `folder`.
///
/// # Errors
/// A folder of no family here.
pub fn of_folder<V: Visitor>(
    folder: &PipelineFolder,
    visitor: V,
) -> Result<V::Output, WeightsError> {
    let refuse = |reason: String| WeightsError::Config {
        path: folder.root().join("model_index.json"),
        reason,
    };
    match folder.class() {
        class if class.starts_with("Flux") && !class.starts_with("Flux2") => {
            Ok(visitor.visit::<Flux1>())
        }
        class if class == Flux2::DEV || class.starts_with("Flux2Klein") => {
            Ok(visitor.visit::<Flux2>())
        }
        class => Err(refuse(format!(
            "a {class} is not a FLUX.1 or FLUX.2 pipeline"
        ))),
    }
}

/// Lets `visitor` work for the family that reference cases call `name`; `None` if there is none.
pub fn named<V: Visitor>(name: &str, visitor: V) -> Option<V::Output> {
    match name {
        "flux1" => Some(visitor.visit::<Flux1>()),
        "flux2" => Some(visitor.visit::<Flux2>()),
        _ => None,
    }
}

/// The architectures that `folder` states, as far as LoRA files are read against them.
///
/// # Errors
/// A folder of no family here, or a configuration that is missing or describes no network.
pub fn shape(folder: &PipelineFolder) -> Result<ModelShape, WeightsError> {
    struct Shape<'a>(&'a PipelineFolder);
    impl Visitor for Shape<'_> {
        type Output = Result<ModelShape, WeightsError>;
        fn visit<F: Family>(self) -> Self::Output {
            F::shape(self.0)
        }
    }
    of_folder(folder, Shape(folder))?
}
