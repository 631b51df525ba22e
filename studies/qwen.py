"""The true shape of the recipe's model, and a tokenizer of made-up words, for studies that make models at random."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHAPE = {  # Qwen2.5-0.5B's config.json
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
WORDS = range(2, 700)  # w2 to w699 are a token each


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, `w5` the one with id 5; 0 pads and 1 ends."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=template
    )
