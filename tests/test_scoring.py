"""Tests of reading numbers and scoring with them; the reference is a table or a plain loop."""

import json
import random
import re
import time
from fractions import Fraction
from itertools import combinations, pairwise
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadData
from evaluation.generative import (
    SCORERS,
    flexible_extract,
    had_format,
    maj_at_k,
    majority_vote,
    numeric_equal,
    openai_match,
    pass_at_k,
    strict_match,
)
from evaluation.golds import ends_in_number, gold_number, gold_text, gold_value, in_digits
from evaluation.numbers import readings
from evaluation.numerals import MAX_DIGITS, numbers_in
from tests.evaluations import final_number
from tests.published import COMPLETE, GSM8K, SHARED

# text → its numbers; bars between cases; \n is a line end, \t a tab, N is MAX_DIGITS ones
NUMBERS = r"""
18 → 18 | 18.0 → 18 | 18. → 18 | 18.00 → 18 | 007 → 7 | 0 → 0 | -0 → 0 | 00 → 0 | 18, → 18
18; → 18 | (18) → 18 | [18] → 18 | "18" → 18 | *18* → 18 | **18** → 18 | `18` → 18 | 18! → 18
18? → 18 | $18 → 18 | $ 18 → 18 | $18. → 18 | $18.50 → 37/2 | $18$ → 18 | 18$ → 18 | €5 → 5 | 5€ → 5
£5 → 5 | ¥500 → 500 | 50¢ → 50 | $  18 → 18 | US$5 → 5 | \$18 → 18 | \(18\) → 18 | \boxed{18} → 18
$$18$$ → 18 | 1,234 → 1234 | 12,345 → 12345 | 123,456 → 123456 | 1,234,567 → 1234567
1,234,567.89 → 123456789/100 | 1,234. → 1234 | 1,234, → 1234 | $1,234.50 → 2469/2 | -1,234 → -1234
1,23 → 1 23 | 1,2,3 → 1 2 3 | 1,2345 → 1 2345 | 1234,567 → 1234 567 | 1,234,56 → 1 234 56
0,123 → 0 123 | 1, 234 → 1 234 | ,5 → 5 | 1,000,000,000,000 → 1000000000000 | 12,34,567 → 12 34 567
1.234,56 → 617/500 56 | 1,,234 → 1 234 | 100,200 → 100200 | 1.5,2.5 → 3/2 5/2 | 5,6.7 → 5 67/10
1'234 → 1 234 | 1_234 → 1 234 | 1 234 → 1 234 | .5 → 1/2 | 0.5 → 1/2 | -.5 → -1/2 | $.50 → 1/2
0.10 → 1/10 | 3.14159 → 314159/100000 | 5. 6 → 5 6 | x.5 → 5 | 5.x → 5 | ... → | . → | ...5 → 5
5...6 → 5 6 | 5..6 → 5 6 | 1.2.3 → 1 2 3 | v1.2 → 6/5 | 10.0.0.1 → 10 0 0 1 | 1.2.3.4/5 → 1 2 3 4/5
12.05.2024 → 12 5 2024 | 3.5.x → 7/2 | 5.6, → 28/5 | -3 → -3 | −3 → -3 | - 3 → 3 | +3 → 3 | -$5 → -5
$-5 → -5 | $ -5 → -5 | −$5 → -5 | - $5 → 5 | -$ 5 → -5 | -$ -5 → -5 | –3 → 3 | —3 → 3 | --3 → 3
(-3) → -3 | =-3 → -3 | = -3 → -3 | *-3 → -3 | "-3" → -3 | :-3 → -3 | -3.5 → -7/2 | 10-3 → 10 3
10 -3 → 10 -3
10 - 3 → 10 3 | 10−3 → 10 3 | 3-4 → 3 4 | x-3 → 3 | COVID-19 → 19 | é-3 → 3 | )-3 → 3 | (2)-3 → 2 3
]-3 → 3 | }-3 → 3 | 5%-3 → 5 3 | 5$-3 → 5 3 | 5.-3 → 5 3 | 5--3 → 5 3 | _-3 → 3 | 5*-3 → 5 -3
5/-3 → 5 -3 | 5 - -3 → 5 -3 | 5+-3 → 5 -3 | 10-3-2 → 10 3 2 | 1-2/3 → 1 2/3 | -5%-5% → -5 5
1/2 → 1/2 | 10/4 → 5/2 | 4/2 → 2 | -1/2 → -1/2 | $1/2 → 1/2 | 1/2% → 1/2 | 1/2. → 1/2 | 1/2, → 1/2
0/5 → 0 | 1/0 → 1 0 | 1/00 → 1 0 | 0/0 → 0 0 | 1/05 → 1/5 | 1/10 → 1/10 | 1 / 2 → 1 2 | 1/ 2 → 1 2
1 /2 → 1 2 | /2 → 2 | 1/ → 1 | 1//2 → 1 2 | 1/2/3 → 1 2 3 | 12/25/2024 → 12 25 2024 | 1.5/2 → 3/2 2
1/2.5 → 1 5/2 | 1/x → 1 | 1,000/4 → 250 | 1/1,000 → 1/1000 | 1/2,3 → 1/2 3 | $3/$4 → 3 4
5/hour → 5 | (1/2) → 1/2 | 2*1/2 → 2 1/2 | 1 1/2 → 3/2 | -1 1/2 → -3/2 | $1 1/2 → 3/2 | 2 3/4 → 11/4
10 1/3 → 31/3 | 1,000 1/2 → 2001/2 | 0 1/2 → 1/2 | 2 4/2 → 2 2 | 2 2/2 → 2 1 | -2 3/2 → -2 3/2
1  1/2 → 1 1/2 | 1\n1/2 → 1 1/2 | 1-1/2 → 1 1/2 | 1 1/0 → 1 1 0 | 1.5 1/2 → 3/2 1/2
1 1/2/3 → 1 1 2 3 | 1 2 1/2 → 1 5/2 | 1/2 1/3 → 1/2 1/3 | 1 -1/2 → 1 -1/2 | 1½ → 1 | ½ → | 5% → 5
18%. → 18 | 5 % → 5 | 5.5% → 11/2 | -5% → -5 | 5%% → 5 | %5 → 5 | 5 %6 → 5 6 | 100%, → 100 | % →
$ → | 5$6 → 5 6 | 5$ 6 → 5 6 | 5 $6 → 5 6 | $5$6$ → 5 6 | $5-$3 → 5 3 | $5 - $3 → 5 3
$5 -$3 → 5 -3 | $-$5 → 5 | 3:30 → 3 30 | 12:05:09 → 12 5 9 | 2024-01-31 → 2024 1 31 | 5:1 → 5 1
9am → 9 | 10am-3pm → 10 3 | 5' → 5 | 1e5 → 1 5 | 1E-5 → 1 5 | 2^10 → 2 10 | x2 → 2 | H2O → 2
5kg → 5 | 2x3 → 2 3 | 5th → 5 | 0x1F → 0 1 | #5 → 5 | 48/2=24 → 24 24 | <<48/2=24>>24 → 24 24 24
16-3-4=9 → 16 3 4 9 | 5*4=20 → 5 4 20 | 5x=10 → 5 10 | 7×8 → 7 8 | N → N | N1 → | N.N1 → N
N1,234 → 234 | 5.N1 → 5 | 5/N1 → 5 | N1/5 → 5 | $N1 → | 5 N1 → 5 | N1 6 → 6 | -N → -N | ١٢ → | 一 →
１８ →
5٣ → 5 | two → | two 2 → 2 | 5\n6 → 5 6 | a\tb 7 → 7 | 💰5 → 5 | nan → | inf → | - → | , →
"""

# completion → the number it answers with (nothing: it has none)
FINALS = r"""
#### 18 → 18 | #### $18 → 18 | ####18 → 18 | ####  18 → 18 | ##### 18 → 18 | ### 18 → 18
#### -3 → -3 | #### −3 → -3 | #### –3 → -3 | #### 1,234 → 1234 | #### 18.00 → 18 | #### 1/2 → 1/2
#### 1 1/2 → 3/2 | #### 5% → 5 | #### **18** → 18 | #### \$18 → 18 | #### = 18 → 18 | #### $ 18 → 18
#### -$5 → -5 | #### .5 → 1/2 | #### 18\n#### 7 → 18 | #### 0\n7 → 0
#### 18\n\nQuestion: 5 + 5?\nAnswer: 10\n#### 10 → 18 | #### none\n#### 7\n9 → 7 | #### \n7 → 7
####\n5 → 5 | #### Step 1\n2 → 2 | 1 #### Answer: 2 or 3 → | #### #### 18 5 → 18 | #### 1/0 →
<think>#### 5</think>\nThe answer is 6. → 6 | <answer>6</answer> → 6
#### → | → | none → | 5 → 5 | 5 6 → 6 | so 18. → 18 | It is $1,234.50! → 2469/2 | 5... → 5
3 1/2 → 7/2 | half of 3 is 1 1/2. → 3/2 | #### Step 1: Add\nThe total is 7. → 7
#### 1. Add the apples\n3 + 4 = 7\n#### 2. Done\nShe has 7. → 7 | #### The answer is 18 → 18
#### x = 18 → 18 | #### Total: 4 → 4 | #### 40+2 → 42 | #### 40 + 2 = 42 → 42
#### 42 = 40 + 2 → 42 | #### 6*7=42 → 42 | #### 6 x 7 = 42 → 42 | #### 6 \times 7 → 42
#### 42 * 1 week → 42 | #### 42/1 → 42 | #### ~42 → 42 | #### 42, → 42 | #### 42 (see step 3) → 42
#### 42 apples (3 red, 39 green) → 42 | #### (42) → 42 | #### N/A (42?) → | #### Ann 12, Bob 42 →
#### 2 or 3 → | #### 12 and 42 → 12 | #### Ann has 12 and Bob has 42 → | #### 12, 42 → 12
#### four → 4 | #### twenty-five → 25 | #### １８ → 18 | #### 四十二 → 42 | #### 1e3 → 1000
#### 1.5e3 → 1500 | #### 2 × 10^3 → 2000 | #### 2 \times 10^{3} → 2000 | #### 2^10 → 1024
#### 5k → 5000 | #### 1 234 → 1234 | #### 1\,234 → 1234 | #### 1,\!234 → 1234 | #### 1{,}234 → 1234
#### $1 234 567.50 → 2469135/2 | #### 1.5 million → 1500000 | #### 2 dozen → 24
#### $18 and 50 cents → 37/2 | #### 18 dollars and 50 cents → 37/2
#### 2 hours and 30 minutes → 5/2 | #### 5 feet 6 inches → 11/2
#### 1 hour, 30 minutes and 36 seconds → 151/100 | #### 5:00 → 5 | #### 5:00 PM → 5 | #### 2:30 →
#### \frac{3}{4} → 3/4 | #### 2\frac{1}{2} → 5/2 | #### -\frac{1}{2} → -1/2 | #### \frac12 → 1/2
#### 3½ → 7/2 | #### ½ → 1/2 | #### $\boxed{42}$ → 42 | #### \(18\) → 18 | #### \[ 18 \] → 18
#### 18 ÷ 3 → 6 | #### 3 - 5 → -2 | #### 5 × 3 + 2 → 17 | #### 2 + 3 × 5 → 17 | #### not 5 →
#### 18 not 17 → 18 | #### 1.234 euros → 617/500 | #### 50 % → 50 | #### two and a half → 5/2
#### three quarters → 3/4 | #### a dozen → 12 | #### one hundred and five → 105
#### two thousand three hundred → 2300 | #### $5.00 → 5 | #### **$1,200** → 1200 | #### `42` → 42
#### "42" → 42 | #### 42 apples\nShe has 7 left → 42 | #### 42.\n\nNote: 5 → 42
#### Answer: 42 → 42 | #### Answer\n42 → 42 | #### Final Answer:\n\n42 apples → 42 | \boxed{42} → 42
\boxed{42}. Not 41. → 42 | \boxed{41} or rather \boxed{42} → 42 | \[\boxed{\frac{3}{4}}\] → 3/4
\boxed{\$1{,}234.50} → 2469/2 | \boxed{42 \text{ dollars}} → 42 | \boxed{x = 42} → 42
\boxed{\text{four}} → 4 | $\boxed{42\%}$ → 42 | \boxed{6 \times 7 = 42} → 42 | \boxed{1\,234} → 1234
\boxed{} 5 → 5 | \boxed{42 → 42 | \boxed{\mathbf{42}} → 42 | \boxed{3\frac{1}{2}} → 7/2
\boxed{2\text{ hours }30\text{ minutes}} → 5/2 | \boxed{-7} → -7 | \boxed 7 → 7
\boxed{10}\n#### 12 → 12 | #### none\n\boxed{10} → 10 | The answer is 42 → 42
The answer is: 12/4 = 3 → 3 | The answer is 42, not 41. → 42 | The answer is 42 = 6 * 7 → 42
The answer is **42**. There are 3 left. → 42 | the answer is \(\frac{10}{2}\) → 5 | Answer: 42 → 42
**Answer:** 42 → 42 | {"answer": 42} → 42 | {"answer": 42, "steps": 3} → 42 | Answer = 42 → 42
The answer is\n\n42 → 42 | The final answer is: $42 → 42
The correct answer is 7. The answer is 8. → 8 | The answer is not 5, it is 6. → 6
The answer is forty-two. → 42 | 答案是四十二。 → 42 | 所以答案是42个苹果。 → 42 | 答案：42 → 42
Therefore, the answer is 42 (see step 3). → 42 | The answer is x = 42 → 42
The answer is 3 + 4 = 7 → 7 | The answer is 18 dollars and 50 cents. → 37/2
The answer is "42". → 42 | So the answer is 42 apples, since 6*7 = 42 and 50 > 8. → 42
So 3*4=12 → 12 | 3 * 4 = 12 apples of the 50 → 12 | x = 5 → 5
6*7=42 of the 50 students passed. → 42 | Step 1: 6*7=42\nStep 2: done → 42 | 42 = 6*7 → 42
<<48/2=24>>24 of 50 → 24 | Each is $<<2*3=6>>6, so → 6 | 3*4 = 12 = 6*2 → 12
The total is \( 3 \times 14 = 42 \) dollars. → 42 | He pays 18 dollars and 50 cents. → 37/2
It takes 3½ hours. → 7/2 | approximately 3.33 hours → 333/100
He needs 4 trips (since 3.33 is not enough). → 4 | about 1e3 people → 1000 | He arrives at 2:30. →
She has four apples left. → 4 | It is –5 degrees. → -5 | Profit: ($5) loss, so -5 → -5 | 5-6 → -1
It is 10-3 → 7 | 36-18 → 18 | 42 marbles in 2024. → 42 | In 2024. → 2024 | 2 dozen eggs → 24
1.5 million people → 1500000 | ~42 → 42 | 42€ → 42 | £42 → 42 | 4,2 → 2 | print(x)  # prints 42 → 42
x = 6*7\nprint(x)  # prints 42 → 42 | I have 7.\n\nQuestion: what is 5? → 7 | 7<|im_end|> 8 → 7
She has 5 apples.\nThat is one way to see it. → 5 | She has one apple. → 1 | No one has it. →
5 apples\nSo she is done. → 5 | 1. Add 3 and 4.\n2. So 7. → 7 | 3) 7 → 7 | #### - 42 → -42
\boxed{- 42} → -42 | #### half → 1/2 | #### a quarter → 1/4 | #### minus 5 → -5
It is negative five. → -5 | 10 minus 5 → 5 | #### 1_000 → 1000 | 1'234 → 1234
The area is 42 m². → 42 | The area is 42 m^2. → 42 | 42 cm2 → 42 | So 42 H2O → 42 | H2O → 2
#### 42 m^2 → 42 | {"final_answer": 42, "n": 3} → 42 | <answer>42</answer> in 3 steps → 42
print(f"{42:.2f}") → 42 | 1.234,56 € → 30864/25 | 1.234.567 → 1234567 | 4,50 € → 9/2 | €4,50 → 9/2
1 000 000 → 1000000 | 12 000 people → 12000 | It costs $1.2M. → 1200000 | 5 m → 5 | $42K → 42000
So 42 out of 50 passed. → 42 | 42 of the 50 students passed → 42 | 三分之一 → 1/3 | 百分之五十 → 50
答：42 → 42 | ￥42 → 42 | ٤٢ → 42 | #### Janet's 3 ducks make 18 dollars → 18
#### Janet makes $18 every day. → 18 | The answer is 6 * 7 = 42 apples; check: 42/7 = 6. → 42
#### x = 5, y = 7 → 5 | The 5 apples cannot be determined. → | It takes until day 42. → 42
42.\n\n### Question 2: 3? → 42 | 42\n\nUser: 3? → 42 | 42 is the answer to question 3. → 42
The answer is B) 42 → 42 | A dozen and a half → 18 | 一共是四十二个。 → 42 | 他有一百零五元 → 105
3万 → 30000 | 两千三百 → 2300 | 二〇二四 → 2024 | １，２３４ → 1234 | ４２％ → 42
一亿二千万 → 120000000 | 三万亿 → 3000000000000 | 百万 → 1000000
one hundred twenty → 120 | two hundred and fifty-six → 256 | a hundred → 100
six hundred forty-one million two hundred fifty-six thousand six hundred forty-one → 641256641
three hundred thousand → 300000 | twenty one → 21 | four five → | seventy-five cents → 75
five and a half → 11/2 | two thirds → 2/3
three dozen → 36 | It costs $118 000. → 118000 | $12 000 + $20 000 = $32 000 → 32000 | 5 → 5
5 6 → 6 | 5 #### 18 6 → 18 | 5 #### → 5 | 2 4/2 → 2 | (3 + 4) * 2 → 2 | #### (3 + 4) * 2 →
"""

# completion → every value it may mean, the likeliest first
READINGS = r"""
#### 2 hours and 30 minutes → 5/2 150 | #### 1 hour, 30 minutes and 36 seconds → 151/100 453/5 5436
#### 18 dollars and 50 cents → 37/2 1850 | #### 5 feet 6 inches → 11/2 66 | 2 dozen eggs → 24 2
#### 1.5 million → 1500000 3/2 | #### 1.234 euros → 617/500 1234 | #### 5 hours 30 → 5
#### 3 weeks, 2 days → 23/7 23 | $18 and 50 cents → 37/2 1850 | 5 dollars and 250 cents → 250
"""

# gold answer → the number it states (nothing: it states none, or more than one)
GOLDS = r"""
#### 18 → 18 | ####18 → 18 | ####  18 → 18 | ##### 18 → 18 | #### $18 → 18 | #### **18** → 18
#### −18 → -18 | #### –18 → -18 | #### - 18 → -18 | #### +18 → 18 | #### -$5 → -5 | #### 18. → 18
#### 18 apples → 18 | #### 18 (apples) → 18 | #### 18-ounce → | #### 18 miles/hour → 18
####\n18 → 18 | #### 1,234 → 1234 | #### 1{,}234 → 1234 | #### 1,\!234 → 1234 | #### 1,23 →
#### 1 234 → | #### 18.50 → 37/2 | #### x = 18 → 18 | #### Total: 4 → 4 | #### The answer is 4 → 4
#### 6*7 = 42 → 42 | #### 42 = 6*7 → 42 | #### \$18 → 18 | #### $18$ → 18 | #### \(18\) → 18
#### \boxed{18} → 18 | #### 18\% → 18 | #### 18 % → 18 | #### 18 cm^2 → 18 | #### 18 m → 18
#### 30^\circ → 30 | #### 18\text{ apples} → 18 | #### `18` → 18 | #### 1/2 → 1/2 | #### 1 1/2 → 3/2
#### \frac{1}{2} → 1/2 | #### -\frac{1}{2} → -1/2 | #### \frac12 → 1/2
#### 3\n2 of them\n#### 18 → 18 | #### Step 2\nThe answer is 4 → 4 | #### 5\nThe answer is 6 → 6
The answer is: 8 → 8 | so.\nThe answer is 8.\n → 8 | The answer is \frac{1}{2} → 1/2
Answer: 12 → 12 | ## Answer: **12** → 12 | 答案是12。 → 12 | So $\boxed{7}$, as $3+4=7$. → 7
\boxed{\frac{3}{4}} → 3/4 | \boxed{\text{18}} → 18
2+6\nThe final answer is $\boxed{8}$. I hope it is correct. → 8 | Answer IS 5 → 5 | 18 → 18
18.5 → 37/2 | $18 → 18 | -3 → -3 | 9 (apples) → 9 | 1,234 → 1234 | 1/2 → 1/2 | 50% → 50
#### 3 or 4 → | #### 2x+1 → | #### 3x → | #### x^2 → | #### \sqrt{2} → | #### (3, 4) → | #### 7:30 →
#### 10-3 → | #### 1e5 → | #### 2^10 → | #### 2π → | #### 2pi → | #### \frac{\sqrt{3}}{2} →
#### log 3 → | #### f(3) → | #### 3! → | #### N/A (42?) → | #### Ann 12, Bob 42 → | #### x > 5 →
#### x != 5 → | #### 3/x → | #### 5 - x → | #### ≤ 5 → | #### 3 half → | #### none → | #### →
Paris → | 5 apples → | It holds 4*7=28 cups.\n28 → | \boxed{x+1} → | → | \boxed{7 →
The answer is not clear.\nSo 5. → | The answer is (3, 4). → | 7 Up and more → | 10 Downing Street →
Is 5 the answer? →
#### x = 5, y = 7 → | #### Ann = 12, Bob = 42 → | #### x = 5 or x = 7 → | \boxed{x=5,\ y=7} →
#### Total = 6*7 = 42 → 42 | #### $5M → | #### 5 M → | #### 5 m → 5 | #### 5 lakh → | #### 5 mln →
#### not 18 → | #### twice 18 → | \boxed{1\,234} → 1234 | \fbox{18} → 18 | Answer : 18 → 18
The answer is 15. Since 9 + 9 = 18, not more. → 15 | The answer is 18. I hope it is correct. → 18
The answer is Rs. 18. → 18 | The answer is 1.5. So → 3/2 | <answer>18</answer> → 18
<think>1</think><answer>\n18 apples\n</answer> → 18 | <answer>3 or 4</answer> →
<think>#### 5</think>\nThe answer is 6. → 6 | <think>#### 5</think>\nParis →
"""


def cases(table: str) -> list[tuple[str, list[Fraction]]]:
    """The (text, values) of a table."""
    pairs = [case.split("→") for line in table.strip().splitlines() for case in line.split(" | ")]
    return [
        (
            re.sub(r"\\t(?!ext|imes|o\b)", "\t", text.strip().replace(r"\n", "\n")),
            [Fraction(v) for v in values.split()],
        )
        for text, values in pairs
    ]


def test_each_text_in_the_table_has_exactly_the_listed_numbers():
    wrong = {}
    for text, values in cases(NUMBERS.replace("N", "1" * MAX_DIGITS)):
        found = [number.value for number in numbers_in(text)]
        if found != values:
            wrong[text] = found
    assert not wrong
    assert len(cases(NUMBERS.replace("N", "1" * MAX_DIGITS))) >= 200


def test_each_completion_in_the_table_answers_with_the_listed_number():
    wrong = {}
    for text, values in cases(FINALS):
        if final_number(text) != (values[0] if values else None):
            wrong[text] = final_number(text)
    assert not wrong


def test_each_completion_in_the_table_may_mean_all_of_the_listed_numbers():
    for text, values in cases(READINGS):
        assert (text, list(readings(text))) == (text, values)


def test_of_an_answer_that_was_cut_off_only_a_marked_or_boxed_number_counts():
    for text in ("3 + 4 = 7", "The answer is 7", "So 7", "so #### ", "seven"):
        assert readings(text, cut_off=True) == ()
    for text in ("#### 7", r"It is \boxed{7}. And 8"):
        assert readings(text, cut_off=True) == (7,)
    assert numeric_equal("So 7", "#### 7") and not numeric_equal("So 7", "#### 7", cut_off=True)


def read_lines(*path: str) -> list[dict]:
    """The rows of a file next to the repository; skips the test without it."""
    file = SHARED.joinpath(*path)
    if not file.is_file():
        pytest.skip(f"{file.name} is not next to the repository")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["hand_written", "real_zero_shot", "real_tuned"])
def test_completions_are_judged_as_by_a_reader(name):
    rows = read_lines("completions", f"{name}.jsonl")
    assert len(rows) >= 64
    for row in rows:
        correct = numeric_equal(row["text"], row["gold"], cut_off=row.get("cut_off", False))
        assert correct == row["right"], row


def test_nearly_all_human_solutions_are_read_correctly_without_their_marked_line():
    golds = [row["answer"] for row in read_lines("gsm8k", "test.jsonl")]
    right = sum(numeric_equal(gold.rpartition("\n####")[0], gold) for gold in golds)
    assert (len(golds), right) == (1319, 1309)


@pytest.mark.parametrize("head", ["", "#### ", r"\boxed{", "The answer is "])
def test_hostile_texts_are_read_in_linear_time(head):
    pieces = r"""# #### 9 1, 1,111 1/ ( ((a 1+ \frac{1}{ \frac \boxed{ \boxed{} answer one 答案是 四
        twenty- 1e 1^ ^2 = 1= - $ \text{ * ** 1** ` (1 (a= ½ ² ． \, 1:00 € x / a/""".split()
    pieces += ["one hundred and ", "2 hours and 30 minutes ", "(a 1) 2 ", "1 234 ", "\n", "\n1"]
    pieces += ["#### a\n", "1.5 million ", "in 2024 ", "1 * ", "answer is "]
    for piece in pieces:
        text = head + piece * (300_000 // len(piece))
        started = time.process_time()
        final_number(text)
        assert time.process_time() - started < 1, piece


def test_a_found_number_has_its_position_and_whether_it_has_a_unit():
    text = "She paid -$1,250.50, 5 % of 3 1/2 €, or -18 in 2 4/2$; 5$6."
    found = [(text[n.start : n.end], n.has_unit) for n in numbers_in(text)]
    assert found == [
        ("-$1,250.50", True),
        ("5 %", True),
        ("3 1/2", False),
        ("-18", False),
        ("2", False),
        ("4/2$", True),
        ("5", False),
        ("$6", True),
    ]


# The pieces of which numbers and their surroundings consist: few, so that they often meet.
awkward = st.lists(
    st.sampled_from([*"0123$€%-−,./# \nxé₂٣", "1/2", "####", "1" * 99, ",234", " 3/4"]), max_size=40
).map("".join)


@given(st.one_of(st.text(), awkward))
def test_any_text_is_read_without_an_exception(text):
    assert all(isinstance(number.value, Fraction) for number in numbers_in(text))
    assert not any(scorer(text, "#### 99999999999") for scorer in SCORERS.values())
    assert had_format(text) in (True, False)


@given(awkward)
def test_each_run_of_digits_that_is_not_too_long_is_in_exactly_one_number(text):
    numbers = numbers_in(text)
    for run in re.finditer("[0-9]+", text):
        around = [n for n in numbers if n.start <= run.start() and run.end() <= n.end]
        assert len(around) == (len(run[0]) <= MAX_DIGITS)
    assert all(left.end <= right.start for left, right in pairwise(numbers))


@given(awkward, awkward)
def test_lines_are_read_independently_so_k_copies_have_k_times_the_numbers(text, other):
    values = [[n.value for n in numbers_in(part)] for part in (text, other)]
    joined = "\n".join([text, other] * 3)
    assert [n.value for n in numbers_in(joined)] == (values[0] + values[1]) * 3


def test_the_longest_possible_number_is_read_completely():
    integer = "111" + ",111" * 32
    longest = f"-$ -{integer} {integer}/{integer.replace('1', '9')} %"
    (number,) = numbers_in(f"x {longest} x")
    assert (number.start, number.end) == (2, 2 + len(longest))


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["", ".", ".0", ".00", "%", " apples", "\n"])
)
def test_a_number_is_read_in_each_way_of_writing_it(number, after):
    for text in (f"{number}", f"{number:,}", f"${number}", f"$ {number:,}", f"−{-number}"):
        if "−-" not in text:
            assert final_number(f"It is {text}{after}") == number
            assert final_number(f"1\n#### {text}{after}\n2") == number


@given(st.integers(0, 999), st.integers(1, 999), st.integers(1, 9))
def test_fractions_mixed_numbers_and_decimals_are_exact(top, bottom, whole):
    assert final_number(f"{top}/{bottom}") == Fraction(top, bottom)
    assert final_number(f"{whole}.{top:03}") == whole + Fraction(top, 1000)
    mixed = whole + Fraction(top, bottom) if top < bottom else Fraction(top, bottom)
    assert final_number(f"-{whole} {top}/{bottom}") == (-mixed if top < bottom else mixed)


def gold_answers() -> list[str]:
    """The answers of GSM8K's train and test sets."""
    files = [GSM8K / f"{split}.jsonl" for split in ("train", "test")]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line)["answer"] for line in lines]


def test_every_scorer_accepts_every_gold_answer_and_no_answer_off_by_one():
    answers = gold_answers()
    assert len(answers) == (8792 if COMPLETE else 64)
    for answer in answers:
        number = int(answer.split("\n#### ")[1].replace(",", ""))
        assert gold_number(answer) == final_number(answer) == number
        assert ends_in_number(answer) and gold_text(answer).replace(",", "") == str(number)
        assert had_format(answer) and all(scorer(answer, answer) for scorer in SCORERS.values())
        off_by_one = f"#### {number + 1}"
        assert not any(scorer(off_by_one, answer) for scorer in SCORERS.values())


def test_each_gold_answer_in_the_table_states_the_listed_number_or_none():
    wrong = {}
    for text, values in cases(GOLDS):
        if gold_value(text) != (values[0] if values else None):
            wrong[text] = gold_value(text)
    assert not wrong


@given(st.one_of(st.text(), awkward))
def test_any_gold_answer_is_read_and_a_number_in_it_is_one_of_its_numbers(text):
    for gold in (text, f"#### {text}", f"\\boxed{{{text}}}", f"The answer is: {text}"):
        assert gold_value(gold) is None or isinstance(gold_value(gold), Fraction)


@given(st.integers(-(10**9), 10**9), st.sampled_from([1, 2, 5, 8, 10, 1000]))
def test_a_number_in_digits_reads_as_itself(top, bottom):
    assert gold_value(f"#### {in_digits(Fraction(top, bottom))}") == Fraction(top, bottom)
    assert in_digits(Fraction(1, 3)) == "1/3" and in_digits(Fraction(-1, 8)) == "-0.125"


@pytest.mark.parametrize(
    "gold",
    ["####18", "#### $18", "#### **18**", "The answer is: 18", r"\boxed{18}", "18", "#### 18"],
)
def test_a_gold_in_another_form_is_scored_like_one_that_ends_in_the_number(gold):
    for completion in AGAINST_18:
        for scorer in SCORERS.values():
            assert scorer(completion, gold) == scorer(completion, "#### 18")


@pytest.mark.parametrize(
    "piece", ["####", "9", r"\boxed{", "{", "<answer>", "answer is ", "- ", "a.", r"\frac{1}{"]
)
def test_a_hostile_gold_answer_is_read_quickly(piece):
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    assert [gold_value(text), gold_value(f"#### {text}")] == [None, None]
    assert time.process_time() - started < 1


def test_a_gold_answer_without_a_number_is_refused():
    with pytest.raises(BadData, match="states no number.*so it is 18"):
        numeric_equal("", "so it is 18")


# completion, then which of numeric-equal, strict-match, flexible-extract, openai say it is 18
AGAINST_18 = {
    "#### 18": "nsfo",
    "#### 18.": "nsf",  # the harness drops a final point, OpenAI does not
    "#### 18..": "n",
    "#### 18.00": "n",
    "#### $18": "nf",
    "####18": "nf",
    "#### 18\n\nQuestion: 2 + 3?\nAnswer: 5\n#### 5": "nso",  # a run-on after the answer
    "#### 36/2": "n",
    "#### 18 apples": "nsfo",
    "#### 1,8": "sfo",  # commas are nothing to text
    "#### 18,": "nsfo",
    "#### 20\n#### 18": "f",
    "She makes $18.": "nf",
    "She makes $18 ...": "n",  # flexible-extract takes the dots
    "20-2=18": "nf",
    "36-18": "n",  # flexible-extract takes -18
    "1/18": "f",
    "-18": "",
    "": "",
}


@pytest.mark.parametrize("completion", AGAINST_18)
def test_the_scorers_differ_as_documented(completion):
    right = [name for name, scorer in SCORERS.items() if scorer(completion, "6 * 3\n#### 18")]
    assert "".join(name[0] for name in right) == AGAINST_18[completion]
    assert SCORERS["numeric-equal"] is numeric_equal and SCORERS["openai"] is openai_match


def test_had_format_is_true_where_strict_match_and_openai_can_read_a_number():
    assert all(had_format(text) for text in ("6\n#### 18", "#### -3 or so", "#### 0\n#### x"))
    assert not any(had_format(text) for text in ("", "18", "####18", "#### $18", "#### **18**"))


STRICT, FLEXIBLE = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]


def generated(count: int) -> list[tuple[str, str]]:
    """Completions, likely and unlikely ones, each with a gold answer that often fits."""
    rng = random.Random(0)
    joints = [
        " ",
        "\n",
        "",
        ", ",
        ". ",
        " = ",
        "-",
        "/",
        "...",
        " is $",
        "$",
        "%",
        "<<3*6=",
        ">>",
        "\n\n",
    ]
    markers = [
        "#### ",
        "#### ",
        "####",
        "#### $",
        "\n#### -",
        "##### ",
        "#### .",
        "#### ,",
        "#### −",
    ]

    def pair() -> tuple[str, str]:
        n = rng.choice([0, 3, 18, 18, 1234, 1234567, -5])
        forms = [
            f"{n}",
            f"{n:,}",
            f"{n}.",
            f"{n}.0",
            f"${n}",
            f"{n},",
            f"{n + 1}",
            f"{n}$",
            "x",
            "",
        ]
        parts = rng.choices([*joints, *markers, *forms, *forms], k=rng.randrange(9))
        end = rng.choice(["\n#### ", rng.choice(markers)]) + rng.choice(forms) + rng.choice(joints)
        return rng.choice(["".join(parts), "6 * 3 is "]) + rng.choice(
            [end, end, ""]
        ), f"3 * 6 = <<3*6=18>>18\n#### {n:,}"

    return [pair() for _ in range(count)]


def by_definition(completion: str, gold: str, pattern: str, which: int) -> bool:
    """The harness's rule in its own terms: every match, one of them, then each thing to ignore."""
    found = ["".join(match) for match in re.findall(pattern, completion)]
    answer = found[which] if found else "[invalid]"
    for ignored in IGNORED:
        answer, gold = re.sub(ignored, "", answer), re.sub(ignored, "", gold)
    return answer.lower() == gold.lower()


@given(st.one_of(st.text(), awkward), st.sampled_from(["#### 18", "#### 1,230", "#### -3."]))
def test_any_text_is_scored_as_the_harness_defines_it(text, gold):
    for completion in (text, text + gold, gold + text):
        assert strict_match(completion, gold) == by_definition(completion, gold, STRICT, 0)
        assert flexible_extract(completion, gold) == by_definition(completion, gold, FLEXIBLE, -1)


def test_a_thousand_completions_are_scored_as_by_lm_evaluation_harness():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    filters = {
        strict_match: extraction.RegexFilter(STRICT, group_select=0),
        flexible_extract: extraction.RegexFilter(FLEXIBLE, group_select=-1),
    }
    right = {scorer: 0 for scorer in filters}
    for completion, gold in generated(1000):
        for scorer, regex in filters.items():
            (answers,) = regex.apply([[completion]], [{}])
            score = metrics.exact_match_hf_evaluate(
                answers, [gold], regexes_to_ignore=IGNORED, ignore_case=True
            )
            assert scorer(completion, gold) == bool(score["exact_match"]), (completion, gold)
            right[scorer] += bool(score["exact_match"])
    assert all(100 < count < 900 for count in right.values()), right


votes = st.lists(st.one_of(st.none(), st.integers(-2, 2).map(Fraction)), max_size=12)


@given(votes)
def test_the_majority_is_the_most_frequent_vote_and_ties_go_to_the_first(answers):
    cast = [answer for answer in answers if answer is not None]
    winner = majority_vote(answers)
    assert (winner is None) == (not cast)
    for rank, answer in enumerate(cast):
        counts = cast.count(answer), cast.count(winner)
        assert counts[0] < counts[1] or counts[0] == counts[1] and cast.index(winner) <= rank


def test_votes_count_values_not_spellings_and_an_answer_without_a_number_does_not_vote():
    answers = [final_number(text) for text in ("20", "", "18.0", "", "", "#### $18")]
    assert majority_vote(answers) == 18
    assert [maj_at_k(answers, Fraction(18), k) for k in (1, 3, 6)] == [False, False, True]
    assert not maj_at_k([None], Fraction(0), 1)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < right for i in range(n)], k))
            assert pass_at_k(n, right, k) == Fraction(sum(map(any, subsets)), comb(n, k))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(AssertionError):
        pass_at_k(n, c, k)
