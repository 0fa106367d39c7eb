//! A prompt as the one user message of a chat, which is what language models read.

use std::path::Path;

use tokenizers::Tokenizer;

use super::error::{Result, TokenizerError};
use super::framed::{check_added_tokens, count_tokens, first_tokens, token_id};

/// What stands around a prompt, and where padding goes.
#[derive(Debug)]
pub(super) struct ChatForm {
    pub(super) before: &'static str,
    pub(super) after: &'static str,
    /// Tokens that must be in the vocabulary: those of the form.
    pub(super) needed: &'static [&'static str],
    /// Text that is taken out of a prompt.
    pub(super) removed: Option<&'static str>,
}

/// Byte-level BPE over the chat form of a prompt.
///
/// The chat template of the folder is not run: for one user message it gives the text of the form. Added tokens written in a
/// prompt, such as `<|im_end|>`, become their ids.
#[derive(Debug, Clone)]
pub struct ChatTokenizer {
    text: Tokenizer,
    form: &'static ChatForm,
    pad_id: i64,
    pads_left: bool,
}

/// A prompt as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTokens {
    /// The ids, padded.
    pub ids: Vec<i64>,
    /// 1 for a token of the text, 0 for padding.
    pub mask: Vec<i64>,
}

impl ChatTokenizer {
    /// With the text pipeline of `file`.
    ///
    /// # Errors
    /// A vocabulary without the tokens of the form or of padding.
    pub(super) fn new(
        text: Tokenizer,
        file: &Path,
        form: &'static ChatForm,
        pad: &str,
        pads_left: bool,
    ) -> Result<Self> {
        check_added_tokens(&text, file)?;
        for token in form.needed {
            token_id(&text, file, "chat", token)?;
        }
        Ok(Self {
            pad_id: token_id(&text, file, "pad", pad)?,
            text,
            form,
            pads_left,
        })
    }

    /// Tokens of one prompt in its chat form, exactly `max_length` of them; a longer one loses its end, the closing tokens
    /// first.
    ///
    /// # Errors
    /// `max_length` of 0, or a vocabulary that cannot spell the prompt.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<ChatTokens> {
        if max_length == 0 {
            let needed = 1;
            return Err(TokenizerError::TooShort { max_length, needed });
        }
        let mut ids = first_tokens(&self.text, &self.chat(prompt), max_length)?;
        let tokens = ids.len();
        let mut mask = vec![1; tokens];
        ids.resize(max_length, self.pad_id);
        mask.resize(max_length, 0);
        if self.pads_left {
            ids.rotate_left(tokens);
            mask.rotate_left(tokens);
        }
        Ok(ChatTokens { ids, mask })
    }

    /// How many tokens a prompt has in its chat form when none is cut.
    ///
    /// # Errors
    /// A vocabulary that cannot spell the prompt.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        count_tokens(&self.text, &self.chat(prompt))
    }

    fn chat(&self, prompt: &str) -> String {
        let ChatForm { before, after, .. } = self.form;
        match self.form.removed {
            Some(removed) => format!("{before}{}{after}", prompt.replace(removed, "")),
            None => format!("{before}{prompt}{after}"),
        }
    }
}
