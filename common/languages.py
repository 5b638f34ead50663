"""Languages: one code per language for all codes and names that corpora and users write.

The table has ISO 639 codes: two letters, three letters in both forms (deu and ger), retired codes (iw), and members of
a macrolanguage that share its writing system (cmn, arz, azj). Names are English.
"""

import re
from functools import cache

# Codes (first the one used in this project), then names (first the displayed one).
_TABLE = """
aa aar Afar; ab abk Abkhazian; ae ave Avestan; af afr Afrikaans; ak aka Akan; am amh Amharic; an arg Aragonese;
ar ara arb arz apc ary ars acm afb aeb arq ajp Arabic/Standard Arabic; as asm Assamese; av ava Avaric; ay aym Aymara;
az aze azj azb Azerbaijani/Azeri/North Azerbaijani; ba bak Bashkir; be bel Belarusian/Belarussian; bg bul Bulgarian;
bh bih Bihari; bi bis Bislama; bm bam Bambara; bn ben Bengali/Bangla; bo bod tib Tibetan; br bre Breton;
bs bos Bosnian; ca cat Catalan/Valencian; ce che Chechen; ch cha Chamorro; co cos Corsican; cr cre Cree;
cs ces cze Czech; cu chu Church Slavic/Church Slavonic; cv chv Chuvash; cy cym wel Welsh; da dan Danish;
de deu ger German; dv div Dhivehi/Divehi/Maldivian; dz dzo Dzongkha; ee ewe Ewe; el ell gre Greek/Modern Greek;
en eng English; eo epo Esperanto; es spa Spanish/Castilian; et est ekk Estonian; eu eus baq Basque;
fa fas per pes prs Persian/Farsi/Iranian Persian; ff ful fuc Fula/Fulah; fi fin Finnish; fj fij Fijian;
fo fao Faroese; fr fra fre French; fy fry Western Frisian/Frisian; ga gle Irish; gd gla Scottish Gaelic/Gaelic;
gl glg Galician; gn grn gug Guarani; gu guj Gujarati; gv glv Manx; ha hau Hausa; he heb iw Hebrew; hi hin Hindi;
ho hmo Hiri Motu; hr hrv scr Croatian; ht hat Haitian Creole/Haitian; hu hun Hungarian; hy hye arm Armenian;
hz her Herero; ia ina Interlingua; id ind in Indonesian; ie ile Interlingue/Occidental; ig ibo Igbo;
ii iii Sichuan Yi/Nuosu; ik ipk Inupiaq; io ido Ido; is isl ice Icelandic; it ita Italian; iu iku Inuktitut;
ja jpn Japanese; jv jav jw Javanese; ka kat geo Georgian; kg kon Kongo; ki kik Kikuyu/Gikuyu;
kj kua Kuanyama/Kwanyama; kk kaz Kazakh; kl kal Kalaallisut/Greenlandic; km khm Khmer/Central Khmer/Cambodian;
kn kan Kannada; ko kor Korean; kr kau knc Kanuri; ks kas Kashmiri; ku kur kmr Kurdish; kv kom Komi; kw cor Cornish;
ky kir Kyrgyz/Kirghiz; la lat Latin; lb ltz Luxembourgish/Letzeburgesch; lg lug Luganda/Ganda;
li lim Limburgish/Limburgan/Limburger; ln lin Lingala; lo lao Lao; lt lit Lithuanian; lu lub Luba Katanga;
lv lav lvs Latvian; mg mlg plt Malagasy; mh mah Marshallese; mi mri mao Maori; mk mkd mac Macedonian;
ml mal Malayalam; mn mon khk Mongolian; mr mar Marathi; ms msa may zsm Malay; mt mlt Maltese;
my mya bur Burmese/Myanmar; na nau Nauru; nb nob Norwegian Bokmal/Bokmal; nd nde North Ndebele/Northern Ndebele;
ne nep npi Nepali; ng ndo Ndonga; nl nld dut Dutch/Flemish; nn nno Norwegian Nynorsk/Nynorsk; no nor Norwegian;
nr nbl South Ndebele/Southern Ndebele; nv nav Navajo/Navaho; ny nya Chichewa/Chewa/Nyanja; oc oci Occitan;
oj oji Ojibwa; om orm gaz Oromo; or ori ory Odia/Oriya; os oss Ossetian/Ossetic; pa pan Punjabi/Panjabi; pi pli Pali;
pl pol Polish; ps pus pbt pbu Pashto/Pushto; pt por Portuguese; qu que quy quz Quechua; rm roh Romansh;
rn run Kirundi/Rundi; ro ron rum mo mol Romanian/Moldavian/Moldovan; ru rus Russian; rw kin Kinyarwanda;
sa san Sanskrit; sc srd Sardinian; sd snd Sindhi; se sme Northern Sami; sg sag Sango; si sin Sinhala/Sinhalese;
sk slk slo Slovak; sl slv Slovenian/Slovene; sm smo Samoan; sn sna Shona; so som Somali; sq sqi alb als Albanian;
sr srp scc Serbian; ss ssw Swati; st sot Sotho; su sun Sundanese; sv swe Swedish; sw swa swh Swahili; ta tam Tamil;
te tel Telugu; tg tgk Tajik; th tha Thai; ti tir Tigrinya; tk tuk Turkmen; tl tgl fil Tagalog/Filipino;
tn tsn Tswana; to ton Tongan/Tonga; tr tur Turkish; ts tso Tsonga; tt tat Tatar; tw twi Twi; ty tah Tahitian;
ug uig Uyghur/Uighur; uk ukr Ukrainian; ur urd Urdu; uz uzb uzn Uzbek; ve ven Venda; vi vie Vietnamese;
vo vol Volapuk; wa wln Walloon; wo wol Wolof; xh xho Xhosa; yi yid ydd ji Yiddish; yo yor Yoruba;
za zha Zhuang/Chuang; zh zho chi cmn Chinese/Mandarin/Mandarin Chinese/Simplified Chinese/Traditional Chinese;
zu zul Zulu; yue Cantonese/Yue Chinese
"""
_CODES: dict[str, str] = {}
_NAMES: dict[str, str] = {}
for _entry in _TABLE.replace("\n", " ").split(";"):
    _fields = _entry.split()
    _codes = [_field for _field in _fields if _field.islower()]
    _names = " ".join(_fields[len(_codes) :]).split("/")
    _NAMES[_codes[0]] = _names[0]
    _CODES |= dict.fromkeys([*_codes, *(_name.lower() for _name in _names)], _codes[0])

# Languages written without spaces between words.
_UNSPACED = frozenset(("zh", "yue", "wuu", "nan", "hak", "gan", "hsn", "lzh", "ja", "th", "lo", "km", "my", "bo", "dz"))


@cache
def language_code(language: str) -> str:
    """Code of a language from any spelling: "en", "en-GB", "eng", "English" and "en_US.UTF-8" give "en".

    It is the ISO 639-1 code if available. A language that is not in the table is returned in lower case, without its
    region; "" gives "".
    """
    # A name may have several words; subtags of a code and the region of a name follow.
    words = re.split(r"[\W_]+", language.lower().strip())
    codes = (_CODES.get(" ".join(words[:count])) for count in range(len(words), 0, -1))
    return next((code for code in codes if code), words[0])


def language_name(language: str) -> str:
    """English name of a language; the argument itself if it is not in the table."""
    return _NAMES.get(language_code(language), language)


def is_unspaced(language: str) -> bool:
    """True if the language is written without spaces between words."""
    return language_code(language) in _UNSPACED
