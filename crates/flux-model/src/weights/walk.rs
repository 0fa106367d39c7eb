//! Where a walk over a network is, in terms of its checkpoint.

/// Path and owner of the parameter a walk is at.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) path: Vec<String>,
    owner: Vec<String>,
}

impl Walk {
    pub(super) fn enter(&mut self, name: &str, container: &str) {
        // The variants of an enum have no names in checkpoints.
        if !container.starts_with("Enum:") {
            self.path.push(name.into());
        }
        self.owner.push(container.into());
    }

    pub(super) fn exit(&mut self) {
        let owner = self.owner.pop();
        if !owner.is_some_and(|owner| owner.starts_with("Enum:")) {
            self.path.pop();
        }
    }

    /// The parameter's key in diffusers' layout.
    pub(super) fn key(&self) -> String {
        let mut path = self.path.clone();
        if let Some(last) = path.last_mut() {
            match last.as_str() {
                "gamma" => *last = "weight".into(),
                "beta" => *last = "bias".into(),
                _ => {}
            }
        }
        path.join(".")
    }

    /// Burn keeps `[in, out]` where checkpoints keep `[out, in]`.
    pub(super) fn is_transposed(&self, rank: usize) -> bool {
        rank == 2
            && self
                .owner
                .last()
                .is_some_and(|owner| owner == "Struct:Linear")
    }

    /// The shape the checkpoint gives this parameter.
    pub(super) fn stored_shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut shape = shape.to_vec();
        if self.is_transposed(shape.len()) {
            shape.reverse();
        }
        shape
    }
}
