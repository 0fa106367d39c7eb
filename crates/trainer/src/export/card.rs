//! The model card: `README.md` with the metadata that the Hub reads.

use std::collections::BTreeMap;
use std::fmt::Write;

use flux_model::lora::LoraSet;

use crate::config::RunConfig;
use crate::nearest::one_line;
use crate::run::header;

/// What is known of a base model by its repository: what its licence is called on the Hub, and where the text is.
pub(super) struct Licence {
    pub(super) repository: &'static str,
    id: &'static str,
    name: Option<&'static str>,
}

const DEV_LICENCE: Option<&str> = Some("flux-1-dev-non-commercial-license");
const KLEIN_LICENCE: Option<&str> = Some("flux-non-commercial-license");
pub(super) const LICENCES: [Licence; 10] = [
    Licence {
        repository: "black-forest-labs/FLUX.1-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Krea-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Kontext-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-Fill-dev",
        id: "other",
        name: DEV_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.1-schnell",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-dev",
        id: "other",
        name: Some("flux-dev-non-commercial-license"),
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-base-4B",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-4B",
        id: "apache-2.0",
        name: None,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-base-9B",
        id: "other",
        name: KLEIN_LICENCE,
    },
    Licence {
        repository: "black-forest-labs/FLUX.2-klein-9B",
        id: "other",
        name: KLEIN_LICENCE,
    },
];

/// `README.md` as the Hub reads it.
pub(super) struct Card<'a> {
    pub(super) name: &'a str,
    pub(super) base: Option<String>,
    pub(super) trigger: Option<&'a str>,
    pub(super) set: &'a LoraSet,
    pub(super) config: &'a RunConfig,
    /// File by format.
    pub(super) weights: BTreeMap<&'static str, String>,
    /// Index of the prompt, and file.
    pub(super) pictures: &'a [(usize, String)],
}

impl Card<'_> {
    pub(super) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        self.front(&mut text)?;
        writeln!(text, "\n# {}\n", self.name)?;
        match &self.base {
            Some(base) => writeln!(text, "A LoRA for [{base}](https://huggingface.co/{base}).")?,
            None => writeln!(text, "A LoRA for a FLUX model.")?,
        }
        if let Some(trigger) = self.trigger {
            writeln!(text, "\nUse `{trigger}` in the prompt.")?;
        }
        if !self.pictures.is_empty() {
            writeln!(text, "\n| prompt | |\n|---|---|")?;
            for (index, file) in self.pictures {
                let prompt = self.prompt(*index).replace('|', "\\|");
                writeln!(text, "| {prompt} | ![{file}]({file}) |")?;
            }
        }
        self.use_it(&mut text)?;
        self.training(&mut text)?;
        self.licence(&mut text)?;
        Ok(text)
    }

    fn prompt(&self, index: usize) -> String {
        let prompts = self.config.sample.iter().flat_map(|sample| &sample.prompts);
        prompts
            .into_iter()
            .nth(index)
            .map(|prompt| one_line(prompt))
            .unwrap_or_default()
    }

    /// Metadata in YAML; strings are JSON's, which YAML reads.
    fn front(&self, text: &mut String) -> std::fmt::Result {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        writeln!(
            text,
            "---\ntags:\n- text-to-image\n- lora\n- diffusers\n- template:diffusion-lora\n- flux"
        )?;
        if let Some(base) = &self.base {
            writeln!(text, "base_model: {base}")?;
        }
        if let Some(licence) = self.known() {
            writeln!(text, "license: {}", licence.id)?;
            if let Some(name) = licence.name {
                let repository = licence.repository;
                writeln!(
                    text,
                    "license_name: {name}\nlicense_link: https://huggingface.co/{repository}/blob/main/LICENSE.md"
                )?;
            }
        }
        if let Some(trigger) = self.trigger {
            writeln!(text, "instance_prompt: {}", quoted(trigger))?;
        }
        if !self.pictures.is_empty() {
            writeln!(text, "widget:")?;
            for (index, file) in self.pictures {
                writeln!(
                    text,
                    "- text: {}\n  output:\n    url: {file}",
                    quoted(&self.prompt(*index))
                )?;
            }
        }
        writeln!(text, "---")
    }

    fn known(&self) -> Option<&'static Licence> {
        let base = self.base.as_deref()?;
        LICENCES
            .iter()
            .find(|licence| licence.repository.eq_ignore_ascii_case(base))
    }

    fn use_it(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n## Use it")?;
        let base = self.base.as_deref().unwrap_or("BASE_MODEL");
        let prompt = self
            .trigger
            .map_or_else(|| self.prompt(0), |trigger| format!("a photo of {trigger}"));
        let prompt = serde_json::Value::from(prompt);
        if let Some(file) = self.weights.get("diffusers") {
            writeln!(
                text,
                "\n**diffusers**\n\n```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n\
                 pipe = DiffusionPipeline.from_pretrained(\"{base}\", torch_dtype=torch.bfloat16).to(\"cuda\")\n\
                 pipe.load_lora_weights(\"PATH_OR_REPOSITORY\", weight_name=\"{file}\")\n\
                 image = pipe({prompt}).images[0]\n```"
            )?;
        }
        let formats = ["diffusers", "comfyui", "kohya", "peft"];
        if let Some(file) = formats.iter().find_map(|format| self.weights.get(*format)) {
            writeln!(
                text,
                "\n**flux-lora**\n\n```console\n$ flux-lora sample --model {base} --lora {file} --prompt {prompt} --out image.png\n```"
            )?;
        }
        let comfy = self
            .weights
            .get("comfyui")
            .or_else(|| self.weights.get("diffusers"));
        if let Some(file) = comfy {
            writeln!(
                text,
                "\n**ComfyUI**: put `{file}` into `models/loras` and use *Load LoRA*, strength 1."
            )?;
        }
        if let Some(file) = self.weights.get("kohya") {
            writeln!(
                text,
                "\n**Forge, kohya's sd-scripts**: `{file}` (Forge: `models/Lora`, and `<lora:{}:1>` in the prompt).",
                file.trim_end_matches(".safetensors")
            )?;
        }
        if let Some(folder) = self.weights.get("peft") {
            writeln!(
                text,
                "\n**PEFT**: the folder `{folder}`, with `PeftModel.from_pretrained(pipe.transformer, \"{folder}\")`."
            )?;
        }
        Ok(())
    }

    fn training(&self, text: &mut String) -> std::fmt::Result {
        let header = |key: &str| self.set.metadata.get(key).map(|value| one_line(value));
        let lora = &self.config.lora;
        let mut rows = vec![
            (
                "rank, alpha".to_string(),
                Some(format!("{}, {}", lora.r, lora.lora_alpha)),
            ),
            ("layers".to_string(), Some(self.set.len().to_string())),
        ];
        for (name, key) in [
            ("steps", "ss_steps"),
            ("pictures", "ss_num_train_images"),
            ("resolution", "modelspec.resolution"),
            ("pictures a step", "ss_total_batch_size"),
            ("optimizer", "ss_optimizer"),
            ("learning rate", "ss_learning_rate"),
            ("schedule", "ss_lr_scheduler"),
            ("seed", "ss_seed"),
            ("program", header::VERSION),
            ("SHA-256 of the base's transformer", header::BASE),
            ("SHA-256 of the data", header::DATA),
        ] {
            let value = header(key);
            let value = if key == header::VERSION {
                value.map(|version| format!("flux-lora {version}"))
            } else {
                value
            };
            rows.push((name.into(), value));
        }
        writeln!(text, "\n## Training\n\n| | |\n|---|---|")?;
        for (name, value) in rows
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
        {
            writeln!(text, "| {name} | {value} |")?;
        }
        writeln!(
            text,
            "\nThe header of each file has all settings (`{}`).",
            header::CONFIG
        )
    }

    fn licence(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n## Licence\n")?;
        match self.known() {
            Some(Licence {
                repository,
                name: Some(name),
                ..
            }) => writeln!(
                text,
                "This is a derivative of {repository}, so its [{name}](https://huggingface.co/{repository}/blob/main/LICENSE.md) holds for it: non-commercial use, and the licence has to come with it. Read it before you share or use this."
            ),
            Some(Licence { repository, id, .. }) => writeln!(
                text,
                "{id}, as {repository}, of which this is a derivative."
            ),
            None => writeln!(
                text,
                "A LoRA is a derivative of its base model: the base model's licence holds for it."
            ),
        }
    }
}
