//! The tokenizer of Mistral-Small-3.2 and the chat form that FLUX.2 dev puts a prompt in.
//!
//! Source: diffusers 0.38 `Flux2Pipeline` (`_get_mistral_3_small_prompt_embeds`, `format_input`, `system_messages.py`).
//!
//! - `tokenizer.json` is needed: Mistral's own `tekken.json` is another format.
//! - Padding is in front, unless `tokenizer_config.json` says otherwise.

use std::path::Path;

use super::chat::{ChatForm, ChatTokenizer};
use super::error::{Result, TokenizerError};
use super::files::Settings;

const FORM: ChatForm = ChatForm {
    before: "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on \
             object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
    after: "[/INST]",
    needed: &[
        "<s>",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[INST]",
        "[/INST]",
    ],
    removed: Some("[IMG]"), // the place of a picture, and there is none
};

impl ChatTokenizer {
    /// Reads Mistral's tokenizer folder.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, a vocabulary without the tokens of the chat form, or `tekken.json` alone.
    pub fn mistral(folder: &Path) -> Result<Self> {
        let settings = Settings::read(folder)?;
        let Some((text, file)) = settings.read_json()? else {
            return Err(match folder.join("tekken.json").is_file() {
                true => TokenizerError::Tekken {
                    path: folder.into(),
                },
                false => TokenizerError::Read {
                    path: folder.join("tokenizer.json"),
                    source: std::io::ErrorKind::NotFound.into(),
                },
            });
        };
        let pad = settings.token("pad_token").unwrap_or("<pad>");
        let pads_left = settings.config["padding_side"] != "right";
        Self::new(text, &file, &FORM, pad, pads_left)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::super::error::Cause;
    use super::*;

    type TestResult = Result<(), Cause>;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/fixtures/parity/flux2_pipeline_dev/model/tokenizer")
    }

    #[test]
    fn padding_is_in_front_and_what_is_too_long_loses_its_end() -> TestResult {
        let tokenizer = ChatTokenizer::mistral(&fixture())?;
        let count = tokenizer.count("a cat")?;
        let tokens = tokenizer.encode("a cat", count + 3)?;
        assert_eq!(tokens.mask[..4], [0, 0, 0, 1]);
        assert_eq!(tokens.ids[..3], [11; 3], "<pad>");
        assert_eq!(tokens.ids[3], 1, "<s>");
        assert_eq!(tokens.ids.last(), Some(&4), "[/INST]");
        let cut = tokenizer.encode("a cat", count - 1)?;
        assert_eq!(cut.ids[..], tokens.ids[3..count + 2]);
        assert!(!cut.mask.contains(&0));
        // the place of a picture goes, any other added token stays one
        assert_eq!(tokenizer.encode("a[IMG] cat", count + 3)?, tokens);
        assert_eq!(tokenizer.count("a cat[INST]")?, count + 1);
        Ok(())
    }

    #[test]
    fn mistrals_own_format_alone_is_refused_by_name() -> TestResult {
        let dir = tempfile::tempdir()?;
        let error = |dir: &Path| {
            let error = ChatTokenizer::mistral(dir).err();
            error.map(|error| error.to_string()).unwrap_or_default()
        };
        let nothing = error(dir.path());
        assert!(nothing.contains("tokenizer.json"), "{nothing}");
        fs::write(dir.path().join("tekken.json"), "{}")?;
        let tekken = error(dir.path());
        assert!(
            tekken.contains("tekken.json") && tekken.contains("FLUX.2-dev"),
            "{tekken}"
        );
        fs::copy(
            fixture().join("tokenizer.json"),
            dir.path().join("tokenizer.json"),
        )?;
        assert_eq!(error(dir.path()), "");
        Ok(())
    }
}
