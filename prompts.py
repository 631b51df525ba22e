"""What the model is asked: the system prompt, the example, and the columns of the data set. Text only."""

QUESTION_COLUMN = "question_zh-cn"  # str, the question as the model reads it
ANSWER_COLUMN = "answer_only"  # int, the label

# Training, evaluation and chat all send exactly this; a model that was trained here is asked as it was trained.
SYSTEM_PROMPT = """\
请先一步一步推理，再给出答案，严格按照下面的格式：
<think>
一步一步写出推理和计算过程
</think>
<answer>
只写一个阿拉伯数字，不写单位
</answer>"""

# And this for a training question without a label, which REWARD_MODEL judges: its answer need not be a number.
OPEN_SYSTEM_PROMPT = """\
请先一步一步思考，再给出回答，严格按照下面的格式：
<think>
一步一步写出思考过程
</think>
<answer>
只写给提问者的完整回答
</answer>"""

# One question answered in the format, each fact and its computation on a line. The model imitates its style and length.
WORKED_EXAMPLE = [
    {
        "role": "user",
        "content": "小明有3盒铅笔，每盒12支。他送给同学8支，又买了剩下支数的一半。他现在有多少支铅笔？",
    },
    {
        "role": "assistant",
        "content": """\
<think>
3盒铅笔一共有：3*12=36支。
送给同学8支后剩下：36-8=28支。
又买的支数是剩下的一半：28/2=14支。
所以他现在有：28+14=42支。
</think>
<answer>
42
</answer>""",
    },
]
# Turns between SYSTEM_PROMPT and every question. WORKED_EXAMPLE helps a model that ignores the format. It costs its
# tokens in every row, counts in MAX_PROMPT_TOKENS, and is carried by the trained model as SYSTEM_PROMPT is.
EXAMPLE: list[dict] = []
